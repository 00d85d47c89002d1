"""One run's losses against what they have cost so far."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from core.reports.figure import Figure
from core.reports.folder import Run, Study
from core.reports.over_training import OverTraining, training_loss


def against_flops(study: Study) -> Figure:
    """The training losses over FLOPs."""
    known = study.runs[0].number("flops_per_token")
    missing = "FLOPs per token stand in the summary, which is written when the run is complete."
    figure = _over(study, "training FLOPs", lambda run: run.metrics["tokens"] * known if known else None, missing)
    return _named(
        figure, "flops", "Training loss against FLOPs", "FLOPs per token, forward and backward, times tokens."
    )


def against_time(study: Study) -> Figure:
    """The training losses over the time inside training steps."""
    longest = seconds_of(study.runs[0])
    most = 0.0 if longest is None else float(longest.max())
    unit, size = ("hours", 3600.0) if most > 7200 else ("minutes", 60.0) if most > 120 else ("seconds", 1.0)

    def scaled(run: Run) -> Any:
        found = seconds_of(run)
        return None if found is None else found / size

    figure = _over(study, f"{unit} of training", scaled, "No throughput has been logged yet, so no time is known.")
    note = "Time inside training steps on this machine: tokens over the logged tokens per second."
    return _named(figure, "time", "Training loss against time", note)


def seconds_of(run: Run) -> Any:
    """A column of the time since training began; the first steps, of unknown speed, take the next's."""
    if not run.has("tokens") or not run.has("tokens_per_second"):
        return None
    tokens, speed = run.metrics["tokens"], run.metrics["tokens_per_second"]
    return (tokens.diff().fillna(tokens.iloc[0]) / speed.ffill().bfill()).cumsum()


def _over(study: Study, axis: str, cost: Callable[[Run], Any], missing: str) -> Figure:
    """The training loss over a column that is made up for it."""
    (run,) = study.runs
    column = cost(run) if run.has("tokens") else None
    if column is None:
        return Figure("", "", missing=missing)
    with_cost = replace(run, metrics=run.metrics.assign(**{axis: column}))
    return training_loss(OverTraining(replace(study, runs=[with_cost]), axis))


def _named(figure: Figure, key: str, title: str, note: str) -> Figure:
    return replace(figure, key=key, title=title, note=f"{note} {figure.note}")
