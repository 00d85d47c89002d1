"""The loads and biases in `loads.safetensors` of each run, thinned and packed for the page's script to unpack.

Values are kept as 16-bit steps between the lowest and the highest of a layer, written as base64: a tenth of the bytes
that their digits would take, and finer than a screen shows.
"""

import base64
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.reports.study_files import Run, Study

VALUES = 1_500_000
"""The most values of all runs together: 4 MB of text."""
SNAPSHOTS = (8, 100)
"""The fewest and the most snapshots of one run."""


@dataclass
class ExpertLoads:
    """Loads and biases by run.

    Args:
        runs: label, steps, and layers with packed values of each run, for the page.
        note: what was left out, and why a run is not here.
        missing: why there is nothing.
    """

    runs: list[dict[str, Any]]
    note: str
    missing: str | None


def experts(study: Study) -> ExpertLoads:
    """Reads the loads of all runs; if they exceed `VALUES`, later seeds are left out first."""
    read: list[tuple[Run, dict[str, Any]]] = []
    for run in study.runs:
        tensors = _read(study, run)
        if tensors is not None:
            read.append((run, tensors))
    if not read:
        missing = (
            "No run has recorded its experts' loads: there are no expert layers, or no checkpoint."
        )
        return ExpertLoads([], "", missing)
    sizes = {id(run): _values_per_snapshot(tensors) for run, tensors in read}
    kept, together = _runs_that_fit(study, [run for run, _ in read], sizes)
    count = min(SNAPSHOTS[1], VALUES // max(1, together))
    packed = [_packed(run, tensors, count, study) for run, tensors in read if id(run) in kept]
    left = len(read) - len(packed)
    note = ""
    if left:
        note = f"{left} runs are left out to keep this file small."
    return ExpertLoads(packed, note, None)


def _values_per_snapshot(tensors: dict[str, Any]) -> int:
    return sum(tensor.shape[1] for name, tensor in tensors.items() if name != "steps")


def _read(study: Study, run: Run) -> dict[str, Any] | None:
    """The tensors of a run's file; None if it has none, or if it cannot be read, which the study notes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = run.path / "loads.safetensors"
    try:
        if not file.exists():
            return None
        tensors = load_file(file)
    except (OSError, SafetensorError) as cause:
        study.unread.append(f"{file.relative_to(study.path)} could not be read ({cause}).")
        return None
    if len(tensors) > 1 and len(tensors.get("steps", [])):
        return tensors
    return None


def _runs_that_fit(study: Study, runs: list[Run], sizes: dict[int, int]) -> tuple[set[int], int]:
    """Chooses the runs that fit into `VALUES` with the fewest snapshots, the first seeds of all variants first.

    Args:
        sizes: the values of one snapshot, by the id of the run.

    Returns:
        The ids of these runs, and the values of one snapshot of all of them together.
    """
    place_in_variant = {id(run): study.of(run.variant).index(run) for run in runs}
    kept: set[int] = set()
    together = 0
    for run in sorted(runs, key=lambda run: place_in_variant[id(run)]):
        if not kept or (together + sizes[id(run)]) * SNAPSHOTS[0] <= VALUES:
            kept.add(id(run))
            together += sizes[id(run)]
    return kept, together


def _packed(run: Run, tensors: dict[str, Any], count: int, study: Study) -> dict[str, Any]:
    """One run as the page's script reads it: at most `count` snapshots (at least 2) at equal distances."""
    steps = tensors["steps"]
    snapshots = min(max(count, 2), len(steps))
    at = np.unique(np.linspace(0, len(steps) - 1, snapshots).round().astype(int))
    label = run.variant
    if study.sweep is not None:
        label = f"{run.variant}, seed {run.seed}"
    names = [name.removeprefix("load.") for name in tensors if name.startswith("load.")]
    layers = []
    for name in sorted(names, key=_natural):
        load = tensors[f"load.{name}"][at].astype(np.float64)
        share = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
        bias = tensors.get(f"bias.{name}")
        packed = None
        if bias is not None:
            packed = pack(bias[at].astype(np.float64))
        layers.append({"name": name, "experts": load.shape[1], "load": pack(share), "bias": packed})
    return {"label": label, "steps": [int(step) for step in steps[at]], "layers": layers}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """The key of a natural order, in which blocks.2 comes before blocks.10."""
    key: list[tuple[int, int | str]] = []
    for piece in re.split(r"(\d+)", name):
        if piece.isdigit():
            key.append((0, int(piece)))
        else:
            key.append((1, piece))
    return key


def pack(values: Any) -> dict[str, Any]:
    """An array as `low + step * integer`, the integers little-endian in base64; values that are not finite become low.

    What is above the lowest value stays above it, so that an expert with one token is not shown as one with none.
    """
    finite = np.where(np.isfinite(values), values, np.nan)
    low = 0.0
    high = 0.0
    if not np.isnan(finite).all():
        low = float(np.nanmin(finite))
        high = float(np.nanmax(finite))
    step = (high - low) / 65535 or 1.0
    integers = np.nan_to_num((finite - low) / step, nan=0.0).round()
    integers = np.where(finite > low, np.maximum(integers, 1), integers).astype("<u2")
    return {"low": low, "step": step, "data": base64.b64encode(integers.tobytes()).decode("ascii")}
