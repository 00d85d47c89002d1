"""Curves over training: thinned to what a screen can show, and gathered over seeds."""

from dataclasses import dataclass
from typing import Any

from core.reports.folder import Run

POINTS = 400
"""The most points of one curve."""
SMOOTH = 40
"""The most points of a curve of differences, which are small beside what one step's loss varies by."""


@dataclass(frozen=True)
class Curve:
    """A column over training, of one run or of several seeds.

    Args:
        x: tokens, or steps where tokens were not logged.
        mean, low, high: over the seeds that have a value there.
        seeds: how many these are, at each point.
        every: the most rows that one point stands for.
    """

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: list[int]
    every: int


def axis_of(runs: list[Run]) -> str:
    """What training is measured in: tokens, unless some run did not log them."""
    read = [run for run in runs if run.metrics is not None]
    return "tokens" if read and all(run.has("tokens") for run in read) else "step"


def reach(runs: list[Run], axis: str) -> float:
    """How far the longest run has come."""
    return max((float(run.metrics[axis].max()) for run in runs if run.has(axis)), default=0.0)


def curve(runs: list[Run], column: str, *, axis: str, end: float) -> Curve | None:
    """A column over the runs together; None where none has a value.

    Values that are no finite numbers are left out. Above `POINTS` values the axis is cut into equal parts: a point
    stands where its part's last value does and is the mean of the part.

    Args:
        end: where the longest run of the report ends, so that all curves are cut alike.
    """
    import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]

    pieces = [_column(run, column, axis, number) for number, run in enumerate(runs) if run.has(column)]
    if not pieces:
        return None
    rows = pd.concat(pieces)
    many = rows["x"].nunique() > POINTS and end > 0
    return _gathered(_averaged(rows, _part(rows, end, POINTS) if many else rows["x"]))


def paired(pairs: list[tuple[Run, Run]], column: str, *, axis: str, end: float) -> Curve | None:
    """How far a column of each run lies above that of its partner; None where no two have values in one part.

    The axis is always cut, into `SMOOTH` parts: what a batch happens to hold goes through both runs of a pair alike,
    and what is left of it is averaged out.

    Args:
        pairs: a run and the baseline's of the same seed.
    """
    import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]

    both = [(n, pair) for n, pair in enumerate(pairs) if all(run.has(column) for run in pair)]
    if not both or end <= 0:
        return None
    sides = [pd.concat([_column(pair[side], column, axis, n) for n, pair in both]) for side in (0, 1)]
    mine, theirs = (_averaged(rows, _part(rows, end, SMOOTH)) for rows in sides)
    rows = mine.merge(theirs, on=["part", "run"], suffixes=("", "_theirs"))
    differences = rows.assign(x=rows[["x", "x_theirs"]].min(axis=1), y=rows["y"] - rows["y_theirs"])
    return _gathered(differences) if len(rows) else None


def _part(rows: Any, end: float, count: int) -> Any:
    """Which of so many equal parts of the axis a row lies in."""
    return (rows["x"] / end * count).clip(upper=count - 1).astype(int)


def _averaged(rows: Any, part: Any) -> Any:
    """Each run's mean in each part."""
    by_run = rows.assign(part=part).groupby(["part", "run"])
    return by_run.agg(x=("x", "max"), y=("y", "mean"), rows=("y", "size")).reset_index()


def _gathered(of_runs: Any) -> Curve:
    """Mean, lowest and highest of the runs in each part."""
    points = of_runs.groupby("part").agg(
        x=("x", "max"), mean=("y", "mean"), low=("y", "min"), high=("y", "max"), seeds=("y", "size")
    )
    numbers = {name: [rounded(v) for v in points[name]] for name in ("mean", "low", "high")}
    x = [float(v) for v in points["x"]]
    return Curve(x, **numbers, seeds=[int(v) for v in points["seeds"]], every=int(of_runs["rows"].max()))


def _column(run: Run, column: str, axis: str, number: int) -> Any:
    import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]

    frame = pd.DataFrame({"x": run.metrics[axis], "y": run.metrics[column], "run": number})
    return frame.dropna()


def rounded(value: float) -> float:
    """Five digits: more than a figure shows, and a third of the bytes."""
    return float(f"{value:.5g}")
