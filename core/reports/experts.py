"""What `loads.safetensors` says of each run, thinned and packed for the page's script to unfold.

Values are kept as 16-bit steps between the lowest and the highest of a layer, written as base64: a tenth of the bytes
that their digits would take, and finer than a screen shows.
"""

import base64
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.reports.folder import Run, Study

VALUES = 1_500_000
"""The most values of all runs together: 4 MB of text."""
SNAPSHOTS = (8, 100)
"""The fewest and the most snapshots of one run."""


@dataclass
class Experts:
    """Loads and biases by run.

    Args:
        runs: for the page: label, steps, layers with packed values.
        note: what was left out, and why a run is not here.
        missing: why there is nothing.
    """

    runs: list[dict[str, Any]]
    note: str
    missing: str | None


def experts(study: Study) -> Experts:
    """Read all runs' loads; the first seed of each variant comes first where not all have room."""
    read: list[tuple[Run, dict[str, Any]]] = []
    for run in study.runs:
        tensors = _read(study, run)
        if tensors is not None:
            read.append((run, tensors))
    if not read:
        return Experts([], "", "No run has recorded its experts' loads: there are no expert layers, or no checkpoint.")
    sizes = {id(run): sum(t.shape[1] for name, t in tensors.items() if name != "steps") for run, tensors in read}
    kept, room = _that_fit(study, [run for run, _ in read], sizes)
    count = min(SNAPSHOTS[1], VALUES // max(1, room))
    packed = [_packed(run, tensors, count, study) for run, tensors in read if id(run) in kept]
    left = len(read) - len(packed)
    note = f"{left} runs are left out to keep this file small." if left else ""
    return Experts(packed, note, None)


def _read(study: Study, run: Run) -> dict[str, Any] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = run.path / "loads.safetensors"
    try:
        tensors = load_file(file) if file.exists() else {}
    except (OSError, SafetensorError) as cause:
        study.unread.append(f"{file.relative_to(study.path)} could not be read ({cause}).")
        return None
    return tensors if len(tensors) > 1 and len(tensors.get("steps", [])) else None


def _that_fit(study: Study, runs: list[Run], sizes: dict[int, int]) -> tuple[set[int], int]:
    """The runs that have room with the fewest snapshots, and how many values one snapshot of all has."""
    turn = {id(run): study.of(run.variant).index(run) for run in runs}
    kept: set[int] = set()
    room = 0
    for run in sorted(runs, key=lambda run: turn[id(run)]):
        if not kept or (room + sizes[id(run)]) * SNAPSHOTS[0] <= VALUES:
            kept.add(id(run))
            room += sizes[id(run)]
    return kept, room


def _packed(run: Run, tensors: dict[str, Any], count: int, study: Study) -> dict[str, Any]:
    steps = tensors["steps"]
    at = np.unique(np.linspace(0, len(steps) - 1, min(max(count, 2), len(steps))).round().astype(int))
    label = f"{run.variant}, seed {run.seed}" if study.sweep is not None else run.variant
    names = sorted((n.removeprefix("load.") for n in tensors if n.startswith("load.")), key=_natural)
    layers = []
    for name in names:
        load = tensors[f"load.{name}"][at].astype(np.float64)
        share = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
        bias = tensors.get(f"bias.{name}")
        packed = None if bias is None else pack(bias[at].astype(np.float64))
        layers.append({"name": name, "experts": load.shape[1], "load": pack(share), "bias": packed})
    return {"label": label, "steps": [int(s) for s in steps[at]], "layers": layers}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """blocks.2 before blocks.10."""
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in re.split(r"(\d+)", name)]


def pack(values: Any) -> dict[str, Any]:
    """An array as `low + step * integer`, the integers little-endian in base64; what is no number counts as low.

    What is above the lowest value stays above it, so that an expert with one token is not shown as one with none.
    """
    finite = np.where(np.isfinite(values), values, np.nan)
    low, high = (0.0, 0.0) if np.isnan(finite).all() else (float(np.nanmin(finite)), float(np.nanmax(finite)))
    step = (high - low) / 65535 or 1.0
    integers = np.nan_to_num((finite - low) / step, nan=0.0).round()
    integers = np.where(finite > low, np.maximum(integers, 1), integers).astype("<u2")
    return {"low": low, "step": step, "data": base64.b64encode(integers.tobytes()).decode("ascii")}
