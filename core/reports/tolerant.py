"""What the files of a run or a sweep hold, without what is not of its kind: any of them may be damaged."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.storage.documents import finite_number

KEPT = ("step", "tokens", "tokens_per_second", "load/max_vio_batch", "skipped_steps")
"""Columns of `metrics.csv` that the report reads, beside those of losses and of validation."""

STATES = ("waiting", "running", "interrupted", "done", "failed")
"""The states of a run."""


def list_of(document: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key; an empty one where something else is there."""
    value = document.get(key)
    return value if isinstance(value, list) else []


def section(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The section under a key; an empty one where something else is there."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def variant_of(variant: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's entry in `sweep.json` without what is not of its kind."""
    pairs = {}
    differences = variant.get("differences")
    for key, pair in differences.items() if isinstance(differences, dict) else ():
        if isinstance(pair, list) and len(pair) == 2:
            pairs[key] = pair
    lists = {key: list_of(variant, key) for key in ("overrides", "notices")}
    return {**variant, **lists, "differences": pairs}


def left_out_of(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The points of the grid that were not run: pairs of a name and a reason."""
    pairs = []
    for one in list_of(document, "left_out"):
        if isinstance(one, dict) and "name" in one:
            pairs.append((str(one["name"]), str(one.get("reason") or "no reason was recorded")))
    return pairs


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `results.json` that name a variant, each with a section `difference`.

    An interval whose ends are damaged is left out.
    """
    rows = []
    for row in list_of(results, "rows"):
        if isinstance(row, dict) and "variant" in row:
            difference = row.get("difference")
            section = difference if isinstance(difference, dict) else {}
            rows.append({**_with_whole_interval(row), "difference": _with_whole_interval(section)})
    return rows


def _with_whole_interval(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with None for `low` and `high` unless they and the mean are numbers."""
    if all(finite_number(row.get(key)) is not None for key in ("mean", "low", "high")):
        return dict(row)
    return {**row, "low": None, "high": None}


def known_state(value: Any) -> str | None:
    """A state as it was recorded; None where it is none."""
    return value if isinstance(value, str) and value in STATES else None


def text_of(value: Any) -> str | None:
    """The text that a value is; None for anything else."""
    return value if isinstance(value, str) else None


def seeds_in(folder: Path) -> list[int]:
    """The seeds of the run folders `seed-N` in a variant's folder, sorted."""
    found = []
    for run in folder.glob("seed-*"):
        seed = run.name.removeprefix("seed-")
        if seed.isdecimal():
            found.append(int(seed))
    return sorted(found)


def is_kept(column: str) -> bool:
    """Whether the report reads a column of `metrics.csv`."""
    of_source = "/source/" in column
    of_average = column.endswith(("/val_loss", "/val_bits_per_byte"))
    if column in KEPT or of_source or of_average:
        return True
    return column.startswith(("loss/", "val_", "val/"))


def placed(frame: Any) -> Any:
    """Gives validation rows, which have no tokens, the step and the tokens of the training row before them."""
    for column in ("tokens", "step"):
        if column not in frame:
            frame[column] = math.nan
    rows_of_training = frame["tokens"].notna()
    if rows_of_training.any():
        frame["step"] = frame["step"].where(rows_of_training).ffill()
    frame["tokens"] = frame["tokens"].ffill()
    return frame
