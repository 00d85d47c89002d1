"""Curves over training: thinned to what a screen can show, and gathered over seeds."""

from dataclasses import dataclass
from typing import Any

from core.reports.study_files import Run

POINTS = 400
"""The most points of one curve."""
SMOOTH = 40
"""The most points of a curve of differences, which are small in comparison with how much one step's loss varies."""


@dataclass(frozen=True)
class Curve:
    """A column over training, of one run or of several seeds.

    Args:
        x: tokens, or steps where tokens were not logged.
        mean, low, high: mean and band over the seeds that have a value there.
        seeds: how many these are, at each point.
        every: the largest number of rows that one point represents.
    """

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: list[int]
    every: int


def axis_of(runs: list[Run]) -> str:
    """The column that measures training: tokens, or steps if some run did not log tokens."""
    read = [run for run in runs if run.metrics is not None]
    if read and all(run.has("tokens") for run in read):
        return "tokens"
    return "step"


def end_of(runs: list[Run], axis: str) -> float:
    """Where the longest run ends on the axis; 0 if no run has a value."""
    return max((float(run.metrics[axis].max()) for run in runs if run.has(axis)), default=0.0)


def curve(runs: list[Run], column: str, *, axis: str, end: float) -> Curve | None:
    """A column over the runs together; None if none has a value.

    Values that are not finite numbers are left out. Above `POINTS` values the axis is cut into equal parts: a point
    is the mean of its part, at the position of the part's last value.

    Args:
        end: where the longest run of the report ends, so that all curves are cut alike.
    """
    import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]

    pieces = []
    for number, run in enumerate(runs):
        if run.has(column):
            pieces.append(_column(run, column, axis, number))
    if not pieces:
        return None
    rows = pd.concat(pieces)
    parts = rows["x"]
    if rows["x"].nunique() > POINTS and end > 0:
        parts = _part(rows, end, POINTS)
    return _gathered(_averaged(rows, parts))


def paired(pairs: list[tuple[Run, Run]], column: str, *, axis: str, end: float) -> Curve | None:
    """How far a column of each run lies above that of its partner; None if no two have values in one part.

    The axis is always cut, into `SMOOTH` parts: what a batch happens to hold goes through both runs of a pair alike,
    and what is left of it is averaged out.

    Args:
        pairs: a run and the baseline's of the same seed.
    """
    import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]

    own = []
    baseline = []
    for number, (run, partner) in enumerate(pairs):
        if run.has(column) and partner.has(column):
            own.append(_column(run, column, axis, number))
            baseline.append(_column(partner, column, axis, number))
    if not own or end <= 0:
        return None
    own_means = _in_parts(pd.concat(own), end)
    baseline_means = _in_parts(pd.concat(baseline), end)
    rows = own_means.merge(baseline_means, on=["part", "run"], suffixes=("", "_baseline"))
    if not len(rows):
        return None
    nearer = rows[["x", "x_baseline"]].min(axis=1)
    return _gathered(rows.assign(x=nearer, y=rows["y"] - rows["y_baseline"]))


def _in_parts(rows: Any, end: float) -> Any:
    """The means of each run in the `SMOOTH` parts of the axis."""
    return _averaged(rows, _part(rows, end, SMOOTH))


def _part(rows: Any, end: float, count: int) -> Any:
    """The number of the part that each row lies in when the axis is cut into `count` equal parts."""
    return (rows["x"] / end * count).clip(upper=count - 1).astype(int)


def _averaged(rows: Any, part: Any) -> Any:
    """The mean of each run in each part, with the last place and the number of the part's rows."""
    by_run = rows.assign(part=part).groupby(["part", "run"])
    return by_run.agg(x=("x", "max"), y=("y", "mean"), rows=("y", "size")).reset_index()


def _gathered(of_runs: Any) -> Curve:
    """The curve of the mean, the lowest and the highest run in each part."""
    points = of_runs.groupby("part").agg(
        x=("x", "max"), mean=("y", "mean"), low=("y", "min"), high=("y", "max"), seeds=("y", "size")
    )
    return Curve(
        x=[float(place) for place in points["x"]],
        mean=_rounded(points["mean"]),
        low=_rounded(points["low"]),
        high=_rounded(points["high"]),
        seeds=[int(count) for count in points["seeds"]],
        every=int(of_runs["rows"].max()),
    )


def _column(run: Run, column: str, axis: str, number: int) -> Any:
    """A frame of the finite values of a column over the axis, with the number of the run."""
    import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]

    frame = pd.DataFrame({"x": run.metrics[axis], "y": run.metrics[column], "run": number})
    return frame.dropna()


def _rounded(values: Any) -> list[float]:
    """The values with five digits: more than a figure shows, and a third of the bytes."""
    return [float(f"{value:.5g}") for value in values]
