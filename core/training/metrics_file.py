"""Reads `metrics.csv` of a run that is continued: which rows are whole, and which are missing.

A row is a step's numbers, which no checkpoint holds. So a damaged file is an error before a run continues, and lost
rows are named.
"""

import codecs
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from core.contracts.errors import UserError
from core.storage.documents import DocumentError, read_bytes
from core.storage.files import write_text

METRICS = "metrics.csv"
"""Name of the file in a run folder."""

STEP = "step"
"""The column that every row has."""

Row = dict[str, str]


@dataclass(frozen=True)
class MetricsFile:
    """The content of the file.

    Args:
        columns: the header.
        rows: the cells of each row by column; `step` is a whole number.
    """

    columns: list[str]
    rows: list[Row]


def read_metrics(file: Path) -> MetricsFile | None:
    """Reads the file; None where there is none.

    A last line without its end is left out: a full disk cuts it short. So is the mark that some editors write first.

    Raises:
        DocumentError: the file, or a line of it, is damaged.
    """
    if not file.is_symlink() and not file.exists():
        return None
    lines = read_bytes(file).removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    columns: list[str] = []
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or not line.endswith(b"\n"):
            continue
        cells = _cells(line, file, number)
        if not columns:
            columns = _header(cells, file, number)
        else:
            rows.append(_row(columns, cells, file, number))
    return MetricsFile(columns, rows)


def _cells(line: bytes, file: Path, number: int) -> list[str]:
    """The cells of a line."""
    try:
        text = line.decode("utf-8")
        found = next(csv.reader([text], strict=True), [])
    except (UnicodeDecodeError, csv.Error) as cause:
        raise DocumentError(file, f"line {number} is damaged: {cause}") from cause
    if "\0" in text:
        raise DocumentError(file, f"line {number} is damaged: it holds NUL bytes")
    return found


def _header(cells: list[str], file: Path, number: int) -> list[str]:
    """The names of the columns."""
    if STEP not in cells or len(set(cells)) < len(cells):
        why = f"it must name the columns, {STEP} among them, each once"
        raise DocumentError(file, f"line {number} is damaged: {why}")
    return cells


def _row(columns: list[str], cells: list[str], file: Path, number: int) -> Row:
    """The cells of a row by column."""
    where = f"line {number} is damaged"
    if len(cells) != len(columns):
        why = f"it has {len(cells)} cells, and the header {len(columns)}"
        raise DocumentError(file, f"{where}: {why}")
    row = dict(zip(columns, cells, strict=True))
    for column, cell in row.items():
        if cell and not _is_number(cell):
            raise DocumentError(file, f"{where}: {column} = {cell[:40]!r}: must be a number")
    step = float(row[STEP] or "nan")
    if not step.is_integer() or step < 0:
        allowed = "must be a whole number, at least 0"
        raise DocumentError(file, f"{where}: {STEP} = {row[STEP][:40]!r}: {allowed}")
    row[STEP] = str(int(step))
    return row


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def write_metrics(file: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Replaces the file atomically, so that a kill loses nothing."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def check_metrics(file: Path, *, step: int, every: int) -> list[str]:
    """Checks that the file holds the rows of the steps that a run has done before it continues.

    Args:
        file: the file.
        step: the last step that is done.
        every: steps between two rows.

    Returns:
        A note where the file was removed, so that the run goes on without the rows.

    Raises:
        UserError: the file is damaged, or rows at its end are missing.
    """
    away = f"or move the file away: the run then goes on, and its log begins with step {step + 1}"
    try:
        found = read_metrics(file)
    except DocumentError as cause:
        raise UserError(f"{cause}; repair it, {away}") from cause
    if step < every:
        return []
    if found is None:
        lost = f"the rows of steps {every} to {step} are lost, and no checkpoint holds them"
        return [f"{file}: there is no such file: {lost}"]
    done = sorted({int(row[STEP]) for row in found.rows if int(row[STEP]) <= step})
    last = done[-1] if done else 0
    if last + max(every, _widest(done)) <= step:
        missing = (
            f"the rows of steps {last + 1} to {step} are missing, and no checkpoint holds them"
        )
        raise UserError(f"{file}: is incomplete: {missing}; put the whole file back, {away}")
    return []


def _widest(steps: list[int]) -> int:
    """The widest distance between neighbouring steps: parts of a run may have logged at other intervals."""
    widest = 1
    for before, after in pairwise(steps):
        widest = max(widest, after - before)
    return widest
