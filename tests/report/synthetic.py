"""Writes folders of synthetic runs and sweeps in the formats of `core.fit` and `core.sweep`."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from core.statistics.comparison import compare, interval

TOKENS = 2048
"""Tokens of a step."""
FLOPS = 22_894_560.0


@dataclass
class Made:
    """What a synthetic run looks like.

    Args:
        steps: how many are done.
        level: the loss at its end.
        uneven: how uneven its load is; None for a dense model.
        biased: whether a selection bias balances its load.
        depths: the number of multi-token depths.
        state: done, running, failed or waiting.
        reason: why it failed.
        diverges: whether its loss is NaN from half of its steps on.
    """

    steps: int = 60
    level: float = 4.2
    uneven: float | None = 0.2
    biased: bool = True
    depths: int = 1
    state: str = "done"
    reason: str | None = None
    diverges: bool = False
    layers: int = 4
    experts: int = 16
    snapshots: int = 40
    notices: list[str] = field(default_factory=list)


def write_run(folder: Path, made: Made, seed: int = 0) -> None:
    """Writes the folder of a run."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    recipe = {"seed": seed, "model": {"dim": 192}, "budget": {"steps": 2 * made.steps}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_json(folder / "provenance.json", provenance())
    columns = metrics(made, draws)
    write_metrics(folder / "metrics.csv", columns)
    write_loads(folder / "loads.safetensors", made, draws)
    if made.state == "done":
        write_json(folder / "summary.json", summary(made, columns, draws))


def provenance() -> dict[str, Any]:
    """The content of `provenance.json`."""
    parts = [
        ("router", "deepseek_v3", "moeloom", "0.1.0"),
        ("balancer", "twist<er>", "loom-twist", "2.0"),
    ]
    components = [
        dict(zip(("slot", "name", "distribution", "version"), part, strict=True)) for part in parts
    ]
    packages = {"torch": "2.13.0+cpu", "lightning": "2.6.6"}
    shell = "fit.py 'recipes/with space.yaml' budget.steps=60 --out runs/it"
    rest = {
        "python": "3.11.7",
        "platform": "Linux-6-x86_64",
        "packages": packages,
        "command": shell,
        "threads": 2,
    }
    return {"components": components, "lightning_callback_factories": [], **rest}


def metrics(made: Made, draws: np.random.Generator) -> dict[str, np.ndarray]:
    """Columns over steps; the columns of validation are NaN at steps without one."""
    steps = np.arange(1, made.steps + 1)
    at = steps / (2 * made.steps if made.state == "running" else made.steps)
    loss = (
        made.level
        + 4 * np.exp(-12 * at)
        + 0.3 * (1 - at)
        + 0.08 * draws.standard_normal(made.steps)
    )
    if made.diverges:
        loss[made.steps // 2 :] = np.nan
    columns = {
        "step": steps,
        "tokens": steps * TOKENS,
        "loss/next_token": loss,
        "loss/total": 1.3 * loss,
    }
    columns |= {"lr": 0.003 * at, "skipped_steps": np.where(np.isnan(loss), 1.0, 0.0).cumsum()}
    columns |= {
        "tokens_per_second": np.where(
            steps > 5, 3000 + 90 * draws.standard_normal(made.steps), np.nan
        )
    }
    if made.uneven is not None:
        columns["load/max_vio_batch"] = (
            made.uneven * (1 + 4 * np.exp(-9 * at)) * draws.uniform(0.7, 1.3, made.steps)
        )
    for depth in range(1, made.depths + 1):
        columns[f"loss/mtp/depth_{depth}"] = loss + 0.3 * depth
    due = (steps % max(1, made.steps // 12) == 0) | (steps == made.steps)
    columns["val_loss"] = np.where(due, loss, np.nan)
    columns["val_bits_per_byte"] = columns["val_loss"] / 3
    for depth in range(1, made.depths + 1):
        columns[f"val/mtp/acceptance_{depth}"] = np.where(
            due, 0.75 * at**0.2 - 0.2 * (depth - 1), np.nan
        )
    return columns


def write_metrics(file: Path, columns: dict[str, np.ndarray]) -> None:
    """Writes rows of training and rows of validation, the latter without tokens."""
    validated = [name for name in columns if name.startswith("val")]
    trained = [name for name in columns if name not in validated]
    listed = {
        name: [f"{v:.7g}" if np.isfinite(v) else "nan" for v in values]
        for name, values in columns.items()
    }
    lines = [
        [*(listed[n][i] for n in trained), *("" for _ in validated)]
        for i in range(len(columns["step"]))
    ]
    rows = []
    for i, line in enumerate(lines):
        rows.append(line)
        if np.isfinite(columns["val_loss"][i]):
            rows.append(
                [str(i + 1) if n == "step" else "" for n in trained]
                + [listed[n][i] for n in validated]
            )
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([trained + validated, *rows])


def write_loads(file: Path, made: Made, draws: np.random.Generator) -> None:
    """Writes loads and biases; nothing for a dense model."""
    if made.uneven is None:
        return
    count = min(made.snapshots, made.steps)
    tensors = {"steps": np.linspace(1, made.steps, count).astype(np.int64)}
    names = [f"blocks.{i}" for i in range(1, made.layers)] + ["heads.mtp.depths.0.block"]
    for name in names:
        taste = np.exp(2 * made.uneven * draws.standard_normal(made.experts))
        share = taste / taste.sum() * draws.uniform(0.9, 1.1, (count, made.experts))
        tensors[f"load.{name}"] = (share * TOKENS * 4).astype(np.int64)
        if made.uneven > 1:
            tensors[f"load.{name}"][:, :2] = 0
        if made.biased:
            drift = draws.standard_normal((count, made.experts)).cumsum(0) * 0.003
            tensors[f"bias.{name}"] = drift.astype(np.float32)
    save_file(tensors, file)


def summary(
    made: Made, columns: dict[str, np.ndarray], draws: np.random.Generator
) -> dict[str, Any]:
    """The content of `summary.json` of a finished run."""
    last = {
        name: float(v[np.isfinite(v)][-1]) for name, v in columns.items() if np.isfinite(v).any()
    }
    speed = 3000 + 100 * float(draws.standard_normal())
    bits = made.level / 3 + 0.004 * float(draws.standard_normal())
    return {
        "steps": made.steps,
        "tokens": made.steps * TOKENS,
        "wall_seconds": made.steps * TOKENS / speed + 20,
        "train_seconds": made.steps * TOKENS / speed,
        "tokens_per_second": speed,
        "val_loss": 3 * bits,
        "val_bits_per_byte": bits,
        "max_vio_global": made.uneven,
        "dropped_fraction": 0.0,
        "mtp_acceptance": last.get("val/mtp/acceptance_1"),
        "params_total": 5_104_944,
        "flops_per_token": FLOPS,
        "skipped_steps": int(last["skipped_steps"]),
        "mfu": None,
        "notices": made.notices,
    }


def write_sweep(folder: Path, made: dict[str, Made], seeds: list[int], **about: Any) -> None:
    """Writes the folder of a sweep; a run of `made` may be replaced by `about["but"][(variant, seed)]`."""
    but: dict[tuple[str, int], Made] = about.pop("but", {})
    baseline = next(iter(made))
    states: dict[str, list[dict[str, Any]]] = {}
    values: dict[str, dict[int, float]] = {name: {} for name in made}
    for name, usual in made.items():
        for seed in seeds:
            this = but.get((name, seed), usual)
            path = folder / "runs" / name / f"seed-{seed}"
            if this.state == "waiting":
                path.mkdir(parents=True)
            else:
                write_run(path, this, seed)
            if this.state == "done":
                values[name][seed] = json.loads((path / "summary.json").read_text())[
                    "val_bits_per_byte"
                ]
            write_json(
                path / "status.json", {"state": this.state, "reason": this.reason, "seconds": 61.0}
            )
            row = {
                "seed": seed,
                "state": this.state,
                "value": values[name].get(seed),
                "reason": this.reason,
            }
            states.setdefault(name, []).append(row)
    document = {
        "name": folder.name,
        "title": "Which routing?",
        "metric": "val_bits_per_byte",
        "better": "lower",
    }
    document |= {
        "baseline": baseline,
        "seeds": seeds,
        "command": "python -m core.sweep routing.yaml --out it",
    }
    document |= {
        "started": "2026-11-23T12:00:00",
        "held_equal": ["corpus", "steps"],
        "not_equal": [],
    }
    write_json(
        folder / "sweep.json",
        document | {"variants": [variant(name, made[name]) for name in made]} | about,
    )
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": folder.name, "seeds": seeds}))
    write_json(folder / "results.json", results(values, states, baseline))


def variant(name: str, made: Made) -> dict[str, Any]:
    """The entry of one variant in `sweep.json`."""
    sizes = {"params_total": 5_104_944, "params_experts": 2_820_000, "params_active": 2_327_808}
    costs = {
        "flops_per_token": FLOPS,
        "kv_bytes_per_token": 512,
        "top_k": 4,
        "capacity_factor": None,
    }
    promises = {"drops": False, "causal": True, "batch_dependent": False, "notices": made.notices}
    differences = {
        "model.blocks.moe.ffn.router.name": ["deepseek_v3", name],
        "model.tied": [None, True],
    }
    return {
        "name": name,
        "recipe": "base.yaml",
        "overrides": [f"x={name}"],
        **sizes,
        **costs,
        **promises,
    } | {"differences": differences}


def results(
    values: dict[str, dict[int, float]], states: dict[str, list[dict[str, Any]]], baseline: str
) -> dict[str, Any]:
    """The content of `results.json`, computed from the values of each variant by seed."""
    differences = compare(values, baseline, "lower")
    rows = []
    for name, mine in values.items():
        found = interval(list(mine.values())) if mine else None
        spread = {key: getattr(found, key) if found else None for key in ("mean", "low", "high")}
        rows.append(
            {
                "variant": name,
                "runs": states[name],
                "n": len(mine),
                **spread,
                "difference": differences[name],
            }
        )
    failed = [
        (name, run) for name, runs in states.items() for run in runs if run["state"] == "failed"
    ]
    warnings = [f"{name}, seed {run['seed']}: {run['reason']}" for name, run in failed]
    return {"metric": "val_bits_per_byte", "baseline": baseline, "rows": rows, "warnings": warnings}


def write_json(file: Path, document: dict[str, Any]) -> None:
    """Writes one JSON document."""
    file.write_text(json.dumps(document))
