"""Curves over training: thinned to what a screen can show, and gathered over seeds."""

from dataclasses import dataclass
from typing import Any

from core.analysis.report.folder import Run

POINTS = 400
"""The most points of one curve."""


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
    if rows["x"].nunique() > POINTS and end > 0:
        rows["part"] = (rows["x"] / end * POINTS).clip(upper=POINTS - 1).astype(int)
    else:
        rows["part"] = rows["x"]
    of_runs = rows.groupby(["part", "run"]).agg(x=("x", "max"), y=("y", "mean"), rows=("y", "size")).reset_index()
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
