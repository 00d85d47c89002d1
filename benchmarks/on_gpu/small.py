"""Whole runs of a small model, `dsv3_small`, of which sweeps are made: the host is their limit, not the device.

The speed is that of `metrics.csv`, over the second half of a run's steps. Runs begin one after the other in rounds of
alternating order; the last ones share the GPU.
"""

import csv
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.on_gpu.measure import Lab, failed, spread
from benchmarks.on_gpu.runs import Fits

RECIPE = "dsv3_small"
VERSIONS = {
    "fp32": ["precision.name=fp32"],
    "bf16": ["precision.name=bf16"],
    "bf16 compiled": ["precision.name=bf16", "compile=true"],
    "bf16 as a CUDA graph": ["precision.name=bf16", "compile=true", "cuda_graph=true"],
}
TOGETHER = (4,)
"""Runs that share the GPU."""
ROUNDS = 1
STEPS = 300
SECONDS = 150.0
"""Time limit of a run."""


def run(lab: Lab) -> dict[str, Any]:
    """Trains every version in turns, then several of the fastest at a time."""
    found: dict[str, Any] = {"recipe": RECIPE, "steps": _steps(lab), "versions": {}, "together": {}}
    versions = VERSIONS if lab.device == "cuda" else {"fp32": VERSIONS["fp32"]}
    with TemporaryDirectory() as scratch:
        for turn in range(1 if lab.quick else ROUNDS):
            order = list(versions) if turn % 2 == 0 else list(versions)[::-1]
            for name in order:
                made = _train(lab, Path(scratch) / f"{name}-{turn}", versions[name], 1)[0]
                found["versions"].setdefault(name, []).append(made)
                lab.keep(found)
        fastest = list(versions.values())[-1]
        for count in (1,) if lab.quick else TOGETHER:
            folder = Path(scratch) / f"together-{count}"
            found["together"][str(count)] = _train(lab, folder, fastest, count)
            lab.keep(found)
    return found


def _steps(lab: Lab) -> int:
    return 12 if lab.quick else STEPS


def _train(lab: Lab, folder: Path, overrides: list[str], count: int) -> list[dict[str, Any]]:
    """The speeds of runs that go on at the same time."""
    limits = ["budget.tokens=null", f"budget.steps={_steps(lab)}", "checkpoint.every_steps=null"]
    with Fits(folder) as fits:
        for index in range(count):
            own = [*overrides, *limits, f"seed={index}", "validation.every_steps=null"]
            fits.start(f"run{index}", RECIPE, own, threads=2)
        results = fits.results(SECONDS)
    made = []
    for name, result in results.items():
        made.append(result if failed(result) else speed_of(fits.run(name)))
    return made


def speed_of(run: Path) -> dict[str, Any]:
    """Tokens per second over the second half of a run, median and range, and the last loss."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("tokens_per_second")]
    rates = [float(row["tokens_per_second"]) for row in rows[len(rows) // 2 :]]
    losses = [row["loss/total"] for row in rows]
    return {"tokens_per_second": spread(rates) | {"all": None}, "losses": losses[:20]}


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table."""
    table: list[tuple[str, str]] = []
    for name, made in found["versions"].items():
        table.append((name, _words(made)))
    for count, made in found["together"].items():
        table.append((f"{count} runs at once", _words(made, together=True)))
    return table


def _words(made: list[dict[str, Any]], *, together: bool = False) -> str:
    """The speeds of some runs in words."""
    if errors := [why for one in made if (why := failed(one))]:
        return f"failed: {errors[0]}"
    speeds = [one["tokens_per_second"] for one in made]
    medians = [speed["median"] for speed in speeds]
    if together:
        return f"{sum(medians):,.0f} tokens/s together, {min(medians):,.0f} to {max(medians):,.0f} each"
    least = min(speed["least"] for speed in speeds)
    most = max(speed["most"] for speed in speeds)
    return f"{statistics.median(medians):,.0f} tokens/s ({least:,.0f} to {most:,.0f})"
