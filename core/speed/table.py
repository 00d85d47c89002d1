"""The measurements as a table for people."""

from collections.abc import Iterable
from typing import Any

from core.speed.profiling import operator_lines
from core.speed.task import COMPILED
from core.speed.turns import INTERVAL

COLUMNS = (
    ("what", 8),
    ("model", 28),
    ("ours", 9),
    ("peer", 9),
    ("ratio", 6),
    ("interval", 12),
    ("of limit", 8),
    ("memory", 7),
    ("activations", 11),
)


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The lines: a row for each measurement, then what was left out, and where was measured."""
    rows = list(rows)
    lines = [_line([name for name, _ in COLUMNS])]
    for row in rows:
        lines.append(_line(_cells(row)))
    lines.append("")
    lines.append(
        f"speeds in tokens/s; ratios are ours / theirs; {INTERVAL}; memory without Python's own"
    )
    for row in rows:
        lines += _remarks(row)
    if rows:
        lines.append(_where(rows[0]))
    for row in rows:
        lines += operator_lines(row)
    return lines


def _line(cells: list[str]) -> str:
    """Cells in their columns; names to the left, numbers to the right."""
    shown = []
    for index, (cell, (_, width)) in enumerate(zip(cells, COLUMNS, strict=True)):
        shown.append(cell.ljust(width) if index < 2 else cell.rjust(width))
    return "  ".join(shown).rstrip()


def _cells(row: dict[str, Any]) -> list[str]:
    peer = row["peer"]
    low_high = row["interval"]
    return [
        row["what"],
        row["name"],
        _number(row["tokens_per_second"], ",.0f"),
        _number(peer["tokens_per_second"] if peer else None, ",.0f"),
        _number(row["ratio"], ".2f"),
        f"{low_high[0]:.2f}-{low_high[1]:.2f}" if low_high else "",
        _number(row["fraction_of_limit"], ".2f"),
        _number(row["memory_ratio"], ".2f"),
        _number(row.get("activation_ratio"), ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _remarks(row: dict[str, Any]) -> list[str]:
    """What a row says in words."""
    named = f"{row['what']}, {row['name']}"
    lines = [f"{named}: {note}" for note in row["notes"]]
    if row["no_ratio"]:
        lines.append(f"{named}: no ratio: {row['no_ratio']}")
    if row["peer"]:
        others = []
        for name, variant in row["variants"].items():
            others.append(_variant(name, variant))
        lines.append(f"{named}: {', '.join(others)} tokens/s; the best is {row['peer']['best']}")
    by_reason: dict[str, list[str]] = {}
    for name, why in row["left_out"].items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        lines.append(f"{named}: left out: {', '.join(names)}: {why}")
    if "fit" in row:
        fit = row["fit"]
        lines.append(
            f"{named}: the step of core.fit, with metrics: {fit['tokens_per_second']:,.0f} tokens/s, "
            f"{fit['ratio_to_bare_step']:.2f} times the speed of the step alone"
        )
    for name, parts in row.get("start_seconds", {}).items():
        shown = ", ".join(f"{key} {spent:.2f} s" for key, spent in parts.items())
        lines.append(f"{named}: start of {name}: {shown}")
    return lines


def _variant(name: str, variant: dict[str, Any]) -> str:
    """The speed of one of the peer's variants, and how long it compiles if it does."""
    shown = f"{name} {variant['tokens_per_second']:,.0f}"
    if name.endswith(COMPILED):
        shown += f" (after {variant['compile_seconds']:.0f} s of compiling)"
    return shown


def _where(row: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items() if value)
    return f"{row['device_name']}, {row['threads']} threads; {versions}"
