"""The figures of a finished sweep: a mark for each run, and one for each mean."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from core.reports.figure import Figure, Trace
from core.reports.study_files import Run, Study
from core.reports.style import Style, brief, plain, styles, with_line_breaks
from core.reports.words import time_unit
from core.statistics.comparison import NOT_AFTER_HOLM
from core.storage.documents import finite_number

MARKED = {"better": "", "worse": "", NOT_AFTER_HOLM: "-open-dot"}
"""What a verdict adds to the name of a marker; all others add `-open`."""
ROW = 34
LINE = 17
"""Pixels of the row of a variant, and of a line of its name."""
ZERO = {
    "type": "line",
    "xref": "x",
    "yref": "paper",
    "x0": 0,
    "x1": 0,
    "y0": 0,
    "y1": 1,
    "line": {"width": 1.5},
}
"""A vertical line at 0."""


def differences(study: Study, words: str) -> Figure:
    """The difference of each variant to the baseline with its interval; `words` names the metric."""
    baseline = str((study.sweep or {}).get("baseline"))
    figure = Figure("difference", f"Difference to {baseline}: {words}")
    rows = _rows_with_interval(study)
    if not rows:
        figure.missing = "No interval can be given yet: it takes two seeds of a variant that the baseline has too."
        return figure
    names = [str(row["variant"]) for row in rows]
    looks = styles(study.variants, baseline)
    fallback = looks[study.variants[0]]
    for row, name in zip(rows, names, strict=True):
        figure.traces.append(_interval(row["difference"], name, looks.get(name, fallback)))
    better = "right"
    if (study.sweep or {}).get("better", "lower") == "lower":
        better = "left"
    title = {"text": f"{better} of 0 is better"}
    figure.layout = {"shapes": [ZERO], "xaxis": {"title": title}, **row_axis(names)}
    figure.height = row_height(names)
    figure.note = (
        "Mean of the seeds' differences and its 95% interval. Filled marks: a difference is shown, also after Holm's "
        "correction for comparing several variants. Hollow marks: no difference shown."
    )
    if any(row["difference"].get("verdict") == NOT_AFTER_HOLM for row in rows):
        figure.note += (
            " Hollow marks with a dot: the interval leaves out 0, but not after that correction."
        )
    return figure


def _rows_with_interval(study: Study) -> list[dict[str, Any]]:
    """The rows of `results.json` whose difference to the baseline has an interval."""
    found = []
    for row in study.results.get("rows") or []:
        difference = row.get("difference") or {}
        if finite_number(difference.get("low")) is not None:
            found.append(row)
    return found


def _interval(difference: dict[str, Any], name: str, look: Style) -> Trace:
    """A mark at the mean with a bar over the interval."""
    mean = float(difference["mean"])
    low = float(difference["low"])
    high = float(difference["high"])
    verdict = str(difference.get("verdict"))
    bar = {
        "type": "data",
        "array": [high - mean],
        "arrayminus": [mean - low],
        "thickness": 2,
        "width": 6,
        "color": look.colour,
    }
    marker = {
        "symbol": look.marker + MARKED.get(verdict, "-open"),
        "size": 11,
        "color": look.colour,
        "line": {"width": 2, "color": look.colour},
    }
    numbers = f"{mean:+.5g}, from {low:+.5g} to {high:+.5g}"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [mean],
        "y": [with_line_breaks(name)],
        "marker": marker,
        "error_x": bar,
        "showlegend": False,
        "name": brief(name),
        "meta": f"{plain(name)}: {plain(verdict)}<br>{numbers}",
        "hovertemplate": "%{meta}<extra></extra>",
    }


def row_axis(names: list[str]) -> dict[str, Any]:
    """The part of a layout that gives each name a row, the first on top, as in the table."""
    rows = [with_line_breaks(name) for name in names]
    axis = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": rows,
        "range": [len(rows) - 0.5, -0.5],
        "automargin": True,
        "title": {"text": ""},
    }
    return {"yaxis": axis, "hovermode": "closest"}


def row_height(names: list[str]) -> int:
    """Pixels of a figure in which each row is as high as the longest name needs."""
    lines = max(with_line_breaks(name).count("<br>") + 1 for name in names)
    return max(ROW, LINE * lines + 8) * len(names) + 20


def throughput(study: Study) -> Figure:
    """The tokens per second of each run, so that the spread on this machine is seen."""
    missing = "No run has finished yet, so no throughput is known."
    figure = Figure("throughput", "Throughput", missing=missing)
    speeds = {"": lambda run: run.number("tokens_per_second")}
    _draw_rows(figure, study, speeds, "tokens per second")
    if not figure.missing:
        figure.note += (
            " The spread within a row is what this machine adds by itself: a difference in time that is not far beyond "
            "it says nothing."
        )
    return figure


def validated_once(study: Study, columns: list[str]) -> bool:
    """Whether no run has more than one value in these columns, so that there is no curve to draw."""
    counts = []
    for run in study.runs:
        for column in columns:
            if run.has(column):
                counts.append(int(run.metrics[column].notna().sum()))
    return bool(counts) and max(counts) == 1


def at_the_end(figure: Figure, study: Study, columns: dict[str, str], title: str) -> Figure:
    """What replaces a figure over training where every run was validated only once.

    Args:
        figure: its heading and note are kept.
        columns: what is added to a variant's name (", depth 1", or nothing), and the column of `metrics.csv`.
        title: title of the axis of values.
    """
    values = {suffix: partial(_last, column) for suffix, column in columns.items()}
    if study.sweep is not None:
        _draw_rows(figure, study, values, title)
        figure.note = f"No run was validated more than once. {figure.note}"
        return figure
    (run,) = study.runs
    shown = []
    for suffix, value_of in values.items():
        value = value_of(run)
        if value is not None:
            depth = suffix.removeprefix(", ")
            text = f"{value:.5g} ({depth})" if depth else f"{value:.5g}"
            shown.append(text)
    figure.missing = f"The run was validated only once: {title} {', '.join(shown)}."
    return figure


def _last(column: str, run: Run) -> float | None:
    """The last value of a column."""
    if run.has(column):
        return float(run.metrics[column].dropna().iloc[-1])
    return None


def _draw_rows(
    figure: Figure, study: Study, values: Mapping[str, Callable[[Run], float | None]], title: str
) -> None:
    """Gives each variant a row for each kind of value: a mark for each run, and one for their mean.

    Args:
        figure: is filled; if no run has a value it stays as it is.
        values: what is added to a variant's name, and the function that gives a run's value.
        title: title of the axis of values.
    """
    looks = styles(study.variants, (study.sweep or {}).get("baseline"))
    names = []
    for variant in study.variants:
        for suffix, value_of in values.items():
            runs, numbers = _known(study.of(variant), value_of)
            if not runs:
                continue
            name = variant + suffix
            names.append(name)
            row = with_line_breaks(name)
            mean = (sum(numbers) / len(numbers), row)
            figure.traces += _marks(name, looks[variant], runs, numbers, [row] * len(runs), mean)
    if names:
        axis = {"title": {"text": title}}
        figure.missing = None
        figure.height = row_height(names)
        figure.layout = {"xaxis": axis, **row_axis(names), "showlegend": False}
        figure.note = f"{figure.note} Small marks are runs, large hollow ones means.".strip()


def _known(
    runs: list[Run], value_of: Callable[[Run], float | None]
) -> tuple[list[Run], list[float]]:
    """The runs that have a value, and their values."""
    known = []
    values = []
    for run in runs:
        value = value_of(run)
        if value is not None:
            known.append(run)
            values.append(value)
    return known, values


def against_flops(study: Study, metric: str, words: str) -> Figure:
    """The metric over the training FLOPs of each finished run."""
    note = "Training FLOPs of the whole run: per token, forward and backward, times tokens."
    figure = Figure("flops", f"Against FLOPs: {words}", note)
    axis = {"title": {"text": "training FLOPs"}, "tickformat": "~s"}
    return _scatter(figure, study, metric, words, _flops, axis)


def _flops(run: Run) -> float | None:
    per_token = run.number("flops_per_token")
    tokens = run.number("tokens")
    if per_token and tokens:
        return per_token * tokens
    return None


def _seconds(run: Run) -> float | None:
    return run.number("train_seconds") or run.number("wall_seconds")


def against_time(study: Study, metric: str, words: str) -> Figure:
    """The metric over the time inside training steps of each finished run."""
    note = "Time inside training steps on this machine; see the spread of the throughput before relying on it."
    figure = Figure("time", f"Against time: {words}", note)
    longest = max((_seconds(run) or 0.0 for run in study.runs), default=0.0)
    unit, size = time_unit(longest)

    def scaled(run: Run) -> float | None:
        seconds = _seconds(run)
        if seconds:
            return seconds / size
        return None

    return _scatter(
        figure, study, metric, words, scaled, {"title": {"text": f"{unit} of training"}}
    )


def _scatter(
    figure: Figure,
    study: Study,
    metric: str,
    words: str,
    cost: Callable[[Run], float | None],
    axis: dict[str, Any],
) -> Figure:
    """Draws the metric over a cost: a mark for each finished run, and one for the mean of each variant.

    Args:
        figure: is filled.
        metric: a key of `summary.json`.
        words: its meaning.
        cost: gives a run's cost; None if it is not known.
        axis: plotly's description of the axis of costs.
    """
    looks = styles(study.variants, (study.sweep or {}).get("baseline"))
    for name in study.variants:
        runs = []
        xs = []
        ys = []
        for run in study.of(name):
            x = cost(run)
            y = run.number(metric)
            if run.state == "done" and x is not None and y is not None:
                runs.append(run)
                xs.append(x)
                ys.append(y)
        if runs:
            mean = (sum(xs) / len(xs), sum(ys) / len(ys))
            figure.traces += _marks(name, looks[name], runs, xs, ys, mean)
    if not figure.traces:
        figure.missing = "No run has finished yet, so there is no result to compare with its cost."
        return figure
    figure.layout = {
        "xaxis": {**axis, **_widened_range(figure.traces)},
        "yaxis": {"title": {"text": words}},
    }
    figure.note += " Small marks are runs, large hollow ones means over the seeds."
    return figure


def _widened_range(traces: list[Trace]) -> dict[str, Any]:
    """Limits for costs that are all but equal, where plotly would show the last digits of a rounding error."""
    costs = []
    for trace in traces:
        costs += trace["x"]
    middle = (min(costs) + max(costs)) / 2
    if max(costs) - min(costs) < 0.02 * middle:
        return {"range": [0.95 * middle, 1.05 * middle]}
    return {}


def _marks(
    name: str, look: Style, runs: list[Run], x: list[Any], y: list[Any], mean: tuple[Any, Any]
) -> list[Trace]:
    """A trace of small marks, one for each run, and a trace of a large one for their mean."""
    common = {"type": "scatter", "mode": "markers", "legendgroup": name, "name": brief(name)}
    hover = "%{text}<br>%{x:,.5~g}: %{y:.5~g}<extra></extra>"
    single = {
        **common,
        "x": x,
        "y": y,
        "marker": {"symbol": look.marker, "size": 6, "color": look.faint(0.6)},
        "text": [f"{plain(name)}, seed {run.seed}" for run in runs],
        "hovertemplate": hover,
        "showlegend": False,
    }
    large = {
        "symbol": f"{look.marker}-open",
        "size": 14,
        "color": look.colour,
        "line": {"width": 2.2},
    }
    together = {
        **common,
        "x": [mean[0]],
        "y": [mean[1]],
        "marker": large,
        "text": [f"{plain(name)}, mean of {len(runs)}"],
        "hovertemplate": hover,
    }
    return [single, together]
