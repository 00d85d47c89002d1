"""Compares two run folders that should hold the same numbers; returns a sentence for each difference."""

import csv
import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

CLOCK = {
    "mfu",
    "tokens_per_second",
    "wall_seconds",
    "train_seconds",
    "peak_flops",
    "peak_flops_source",
    "peak_memory_bytes",
}
"""Columns and fields that depend on the machine's speed and memory."""

MISSING = "missing"


def differences(one: Path, two: Path) -> list[str]:
    """The differences between two finished run folders.

    Compared are the resolved recipe (keys that only the second one has are allowed: each has a default), every row and
    column of metrics.csv without those of the clock, the weights, biases and optimizer state of the last and of the
    best checkpoint, the loads, the summary, and the sample.
    """
    found = recipe_differences(_yaml(one / "recipe.yaml"), _yaml(two / "recipe.yaml"))
    found += table_differences(rows(one / "metrics.csv"), rows(two / "metrics.csv"))
    found += checkpoint_differences(one, two)
    name = "loads.safetensors"
    found += nested_differences(_tensors(one / name), _tensors(two / name), "loads")
    name = "summary.json"
    found += nested_differences(_summary(one / name), _summary(two / name), name)
    if (one / "sample.txt").read_bytes() != (two / "sample.txt").read_bytes():
        found.append("sample.txt differs")
    return found


def evaluation_differences(one: Path, two: Path) -> list[str]:
    """The differences between two JSON documents that `core.evaluate` printed."""
    return nested_differences(_json(one), _json(two), "evaluate")


def rows(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without the clock's columns; the cells are text, as in the file."""
    with file.open(newline="", encoding="utf-8") as text:
        return [_without_clock(row) for row in csv.DictReader(text)]


def table_differences(one: list[dict[str, str]], two: list[dict[str, str]]) -> list[str]:
    """The first row in which two tables differ, and every column that does there."""
    columns: set[str] = set().union(*one)
    other_columns: set[str] = set().union(*two)
    if columns != other_columns:
        return [f"metrics.csv: other columns: {', '.join(sorted(columns ^ other_columns))}"]
    for first, second in zip_longest(one, two):
        if first is None or second is None:
            return [f"metrics.csv: {len(one)} rows and {len(two)}"]
        different = [key for key in first if first[key] != second[key]]
        if different:
            place = f"metrics.csv: step {first.get('step', '?')}"
            return [f"{place}: {key} is {first[key]} and {second[key]}" for key in different]
    return []


def recipe_differences(one: Any, two: Any) -> list[str]:
    """The differences between two resolved recipes; a key that only the second one has is none."""
    first = leaves(one)
    second = leaves(two)
    shared = {path: second.get(path, MISSING) for path in first}
    return nested_differences(first, shared, "recipe.yaml")


def checkpoint_differences(one: Path, two: Path) -> list[str]:
    """The differences between weights, buffers and optimizer states of two runs' last and best checkpoints."""
    found = []
    names = _checkpoint_names(one)
    other_names = _checkpoint_names(two)
    last = max(name for name in names if name.startswith("step-"))
    for name in (last, "best.ckpt"):
        if name not in names and name not in other_names:
            continue
        if name not in names or name not in other_names:
            found.append(f"checkpoints: {names} and {other_names}")
            continue
        first = _checkpoint(one / "checkpoints" / name)
        second = _checkpoint(two / "checkpoints" / name)
        for part in ("state_dict", "optimizer_states"):
            found += nested_differences(first[part], second[part], f"{name} {part}")
    return found


def nested_differences(one: Any, two: Any, where: str) -> list[str]:
    """Every leaf of nested containers that differs: tensors by dtype, shape and bits, everything else by equality."""
    first = leaves(one)
    second = leaves(two)
    found = []
    for path in sorted(first.keys() ^ second.keys()):
        found.append(f"{where}: {path} is only in one of them")
    for path in first:
        if path in second and not _same(first[path], second[path]):
            found.append(f"{where}: {path} {_how(first[path], second[path])}")
    return found


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested containers by its path; an empty container is a leaf."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    if not items:
        return {path: value}
    found = {}
    for key, item in items:
        inner = f"{path}.{key}" if path else str(key)
        found.update(leaves(item, inner))
    return found


def _without_clock(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in CLOCK}


def _same(one: Any, two: Any) -> bool:
    """Whether two leaves are equal; tensors are compared by their bytes."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            return False
        bits = one.contiguous().reshape(-1).view(torch.uint8)
        other_bits = two.contiguous().reshape(-1).view(torch.uint8)
        return torch.equal(bits, other_bits)
    return type(one) is type(two) and bool(one == two)


def _how(one: Any, two: Any) -> str:
    """The end of a sentence about two leaves that differ."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            return f"is {one.dtype} {tuple(one.shape)} and {two.dtype} {tuple(two.shape)}"
        gap = (one.double() - two.double()).abs()
        elements = int((gap != 0).sum())
        most = float(gap.max())
        return f"differs in {elements} of {gap.numel()} elements by up to {most:.3g}"
    return f"is {one!r} and {two!r}"


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _summary(file: Path) -> dict[str, Any]:
    return _without_clock(_json(file))


def _checkpoint_names(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").iterdir())


def _yaml(file: Path) -> Any:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _checkpoint(file: Path) -> Any:
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; none if it does not exist, as for a model without experts."""
    from safetensors.torch import load_file

    return load_file(file) if file.exists() else {}
