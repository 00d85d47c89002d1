"""What differs between two run folders that should hold the same numbers, as sentences; none where nothing does."""

import csv
import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

CLOCK = {"mfu", "tokens_per_second", "wall_seconds", "train_seconds", "peak_flops", "peak_memory_bytes"}
"""Columns and fields that depend on the machine's speed and memory."""

MISSING = "missing"


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two finished run folders.

    Compared are the resolved recipe (keys that only the second one has are allowed: each has a default), every row and
    column of metrics.csv but those of the clock, the weights, biases and optimizer state of the last and of the best
    checkpoint, the loads, the summary, and the sample.
    """
    found = recipe_differences(_yaml(one / "recipe.yaml"), _yaml(two / "recipe.yaml"))
    found += table_differences(rows(one / "metrics.csv"), rows(two / "metrics.csv"))
    found += checkpoint_differences(one, two)
    found += nested_differences(_tensors(one / "loads.safetensors"), _tensors(two / "loads.safetensors"), "loads")
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (one, two)]
    without_clock = [{key: value for key, value in summary.items() if key not in CLOCK} for summary in summaries]
    found += nested_differences(*without_clock, "summary.json")
    samples = [(folder / "sample.txt").read_bytes() for folder in (one, two)]
    if samples[0] != samples[1]:
        found.append("sample.txt differs")
    return found


def evaluation_differences(one: Path, two: Path) -> list[str]:
    """What differs between two JSON documents that `core.evaluate` printed."""
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in (one, two)]
    return nested_differences(*documents, "evaluate")


def rows(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without the clock's columns, as written: a cell is text."""
    with file.open(newline="", encoding="utf-8") as text:
        table = list(csv.DictReader(text))
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in table]


def table_differences(one: list[dict[str, str]], two: list[dict[str, str]]) -> list[str]:
    """The first row in which two tables differ, and every column that does there."""
    columns = [set().union(*table) for table in (one, two)]
    if columns[0] != columns[1]:
        return [f"metrics.csv: other columns: {', '.join(sorted(columns[0] ^ columns[1]))}"]
    for first, second in zip_longest(one, two):
        if first is None or second is None:
            return [f"metrics.csv: {len(one)} rows and {len(two)}"]
        different = [key for key in first if first[key] != second[key]]
        if different:
            step = first.get("step", "?")
            return [f"metrics.csv: step {step}: {key} is {first[key]} and {second[key]}" for key in different]
    return []


def recipe_differences(one: Any, two: Any) -> list[str]:
    """What differs between two resolved recipes; a key that only the second one has is no difference."""
    first, second = leaves(one), leaves(two)
    shared = {path: second.get(path, MISSING) for path in first}
    return nested_differences(first, shared, "recipe.yaml")


def checkpoint_differences(one: Path, two: Path) -> list[str]:
    """What differs between the weights, buffers and optimizer states of two runs' last and best checkpoints."""
    found = []
    names = [sorted(file.name for file in (folder / "checkpoints").iterdir()) for folder in (one, two)]
    for name in (max(n for n in names[0] if n.startswith("step-")), "best.ckpt"):
        if name not in names[0] and name not in names[1]:
            continue
        if name not in names[0] or name not in names[1]:
            found.append(f"checkpoints: {names[0]} and {names[1]}")
            continue
        first, second = (_checkpoint(folder / "checkpoints" / name) for folder in (one, two))
        for part in ("state_dict", "optimizer_states"):
            found += nested_differences(first[part], second[part], f"{name} {part}")
    return found


def nested_differences(one: Any, two: Any, where: str) -> list[str]:
    """Every leaf of nested containers that differs: tensors by dtype, shape and bits, everything else by equality."""
    first, second = leaves(one), leaves(two)
    found = [f"{where}: {path} is only in one of them" for path in sorted(first.keys() ^ second.keys())]
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
        found.update(leaves(item, f"{path}.{key}" if path else str(key)))
    return found


def _same(one: Any, two: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            return False
        bytes_of = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)]
        return torch.equal(*bytes_of)
    return type(one) is type(two) and bool(one == two)


def _how(one: Any, two: Any) -> str:
    import torch

    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            return f"is {one.dtype} {tuple(one.shape)} and {two.dtype} {tuple(two.shape)}"
        gap = (one.double() - two.double()).abs()
        return f"differs in {int((gap != 0).sum())} of {gap.numel()} elements by up to {float(gap.max()):.3g}"
    return f"is {one!r} and {two!r}"


def _yaml(file: Path) -> Any:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _checkpoint(file: Path) -> Any:
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; none where there is no such file, as for a model without experts."""
    from safetensors.torch import load_file

    return load_file(file) if file.exists() else {}
