"""The losses of one run over what its training has cost so far."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from core.reports.figure import Figure
from core.reports.over_training import OverTraining, training_loss
from core.reports.study_files import Run, Study
from core.reports.words import time_unit


def against_flops(study: Study) -> Figure:
    """The training losses over FLOPs."""
    per_token = study.runs[0].number("flops_per_token")

    def flops(run: Run) -> Any:
        if per_token:
            return run.metrics["tokens"] * per_token
        return None

    missing = "FLOPs per token are in the summary, which is written when the run is complete."
    figure = _over(study, "training FLOPs", flops, missing)
    note = "FLOPs per token, forward and backward, times tokens."
    return _named(figure, "flops", "Training loss against FLOPs", note)


def against_time(study: Study) -> Figure:
    """The training losses over the time inside training steps."""
    longest = 0.0
    known = seconds_of(study.runs[0])
    if known is not None:
        longest = float(known.max())
    unit, size = time_unit(longest)

    def scaled(run: Run) -> Any:
        seconds = seconds_of(run)
        if seconds is None:
            return None
        return seconds / size

    missing = "No throughput has been logged yet, so no time is known."
    figure = _over(study, f"{unit} of training", scaled, missing)
    note = "Time inside training steps on this machine: tokens over the logged tokens per second."
    return _named(figure, "time", "Training loss against time", note)


def seconds_of(run: Run) -> Any:
    """A column of the seconds since training began; None if it is not known.

    The first steps, whose speed was not logged, count with that of the first step whose speed was.
    """
    if not run.has("tokens") or not run.has("tokens_per_second"):
        return None
    tokens = run.metrics["tokens"]
    speed = run.metrics["tokens_per_second"]
    return (tokens.diff().fillna(tokens.iloc[0]) / speed.ffill().bfill()).cumsum()


def _over(study: Study, axis: str, cost: Callable[[Run], Any], missing: str) -> Figure:
    """The training loss over a cost.

    Args:
        axis: the name of the cost, and the title of the axis.
        cost: gives a column of costs for the rows of `metrics.csv`; None if they are not known.
        missing: why there is no figure then.
    """
    (run,) = study.runs
    column = None
    if run.has("tokens"):
        column = cost(run)
    if column is None:
        return Figure("", "", missing=missing)
    with_cost = replace(run, metrics=run.metrics.assign(**{axis: column}))
    return training_loss(OverTraining(replace(study, runs=[with_cost]), axis))


def _named(figure: Figure, key: str, title: str, note: str) -> Figure:
    return replace(figure, key=key, title=title, note=f"{note} {figure.note}")
