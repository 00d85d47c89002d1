"""The figures of a finished sweep: a point for each run, a mark for each mean."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from core.reports.figure import Figure, Trace
from core.reports.folder import Run, Study, finite
from core.reports.style import Style, brief, broken, plain, styles
from core.statistics.comparison import NOT_AFTER_HOLM

MARKED = {"better": "", "worse": "", NOT_AFTER_HOLM: "-open-dot"}
"""What a verdict adds to a marker's name."""
ROW, LINE = 34, 17
"""Pixels of a row that stands for a variant, and of a line of its name."""


def differences(study: Study, words: str) -> Figure:
    """Each variant's difference to the baseline with its interval."""
    baseline = str((study.sweep or {}).get("baseline"))
    lower = (study.sweep or {}).get("better", "lower") == "lower"
    figure = Figure("difference", f"Difference to {baseline}: {words}")
    rows = [r for r in study.results.get("rows") or [] if finite((r.get("difference") or {}).get("low")) is not None]
    if not rows:
        figure.missing = "No interval can be given yet: it takes two seeds of a variant that the baseline has too."
        return figure
    names = [str(row["variant"]) for row in rows]
    looks = styles(study.variants, baseline)
    for row, name in zip(rows, names, strict=True):
        figure.traces.append(_interval(row["difference"], name, looks.get(name, looks[study.variants[0]])))
    zero = {"type": "line", "xref": "x", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "line": {"width": 1.5}}
    better = "left" if lower else "right"
    title = f"{better} of 0 is better"
    figure.layout = {"shapes": [zero], "xaxis": {"title": {"text": title}}, **_rows_of(names)}
    figure.height = _height(names)
    figure.note = (
        "Mean of the seeds' differences and its 95% interval. Filled marks: a difference is shown, also after Holm's "
        "correction for asking about several variants. Hollow marks: no difference shown."
    )
    if any(row["difference"].get("verdict") == NOT_AFTER_HOLM for row in rows):
        figure.note += " Hollow marks with a dot: the interval leaves out 0, but not after that correction."
    return figure


def _interval(difference: dict[str, Any], name: str, look: Style) -> Trace:
    mean, low, high = (float(difference[key]) for key in ("mean", "low", "high"))
    symbol = look.marker + MARKED.get(str(difference.get("verdict")), "-open")
    bars = {"type": "data", "array": [high - mean], "arrayminus": [mean - low], "thickness": 2, "width": 6}
    told = f"{plain(name)}: {plain(str(difference.get('verdict')))}<br>{mean:+.5g}, from {low:+.5g} to {high:+.5g}"
    marker = {"symbol": symbol, "size": 11, "color": look.colour, "line": {"width": 2, "color": look.colour}}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [mean],
        "y": [broken(name)],
        "marker": marker,
        "error_x": {**bars, "color": look.colour},
        "showlegend": False,
        "name": brief(name),
        "meta": told,
        "hovertemplate": "%{meta}<extra></extra>",
    }


def _rows_of(names: list[str]) -> dict[str, Any]:
    """A row for each name, the first on top, as in the table."""
    rows = [broken(name) for name in names]
    axis = {"type": "category", "categoryorder": "array", "categoryarray": rows, "range": [len(rows) - 0.5, -0.5]}
    return {"yaxis": {**axis, "automargin": True, "title": {"text": ""}}, "hovermode": "closest"}


def _height(names: list[str]) -> int:
    """Room for the longest name in every row."""
    lines = max(broken(name).count("<br>") + 1 for name in names)
    return max(ROW, LINE * lines + 8) * len(names) + 20


def throughput(study: Study) -> Figure:
    """Each run's tokens per second, so that the spread of this machine is seen."""
    figure = Figure("throughput", "Throughput", missing="No run has finished yet, so no throughput is known.")
    _strip(figure, study, {"": lambda run: run.number("tokens_per_second")}, "tokens per second")
    if not figure.missing:
        figure.note += (
            " The spread within a row is what this machine adds by itself: a difference in time that is not far beyond "
            "it says nothing."
        )
    return figure


def validated_once(study: Study, columns: list[str]) -> bool:
    """Whether no run has more than one value in these columns, so that there is nothing to draw over training."""
    counts = [int(run.metrics[column].notna().sum()) for run in study.runs for column in columns if run.has(column)]
    return bool(counts) and max(counts) == 1


def at_the_end(figure: Figure, study: Study, columns: dict[str, str], title: str) -> Figure:
    """What stands for a figure over training where every run was validated only once.

    Args:
        figure: its heading and note are kept.
        columns: what is added to a variant's name (", depth 1", or nothing), and the column of `metrics.csv`.
        title: of the values.
    """
    values = {suffix: partial(_last, column) for suffix, column in columns.items()}
    if study.sweep is not None:
        _strip(figure, study, values, title)
        figure.note = f"No run was validated more than once. {figure.note}"
        return figure
    (run,) = study.runs
    known = [(suffix[2:], value) for suffix, of in values.items() if (value := of(run)) is not None]
    told = [f"{value:.5g} ({depth})" if depth else f"{value:.5g}" for depth, value in known]
    figure.missing = f"The run was validated only once: {title} {', '.join(told)}."
    return figure


def _last(column: str, run: Run) -> float | None:
    return float(run.metrics[column].dropna().iloc[-1]) if run.has(column) else None


def _strip(figure: Figure, study: Study, values: Mapping[str, Callable[[Run], float | None]], title: str) -> None:
    """A row for each variant, or for each of its values: a mark for each run and one for their mean."""
    looks = styles(study.variants, (study.sweep or {}).get("baseline"))
    names = []
    for variant in study.variants:
        for suffix, of in values.items():
            found = [(run, value) for run in study.of(variant) if (value := of(run)) is not None]
            if found:
                names.append(variant + suffix)
                row, numbers = broken(names[-1]), [value for _, value in found]
                mean = (sum(numbers) / len(numbers), row)
                runs = [run for run, _ in found]
                figure.traces += _marks(names[-1], looks[variant], runs, numbers, [row] * len(runs), mean)
    if names:
        figure.missing = None
        figure.height = _height(names)
        figure.layout = {"xaxis": {"title": {"text": title}}, **_rows_of(names), "showlegend": False}
        figure.note = f"{figure.note} Small marks are runs, large hollow ones means.".strip()


def against_flops(study: Study, metric: str, words: str) -> Figure:
    """The metric over what training cost."""
    note = "Training FLOPs of the whole run: per token, forward and backward, times tokens."
    figure = Figure("flops", f"Against FLOPs: {words}", note)
    return _scatter(figure, study, metric, words, _flops, "training FLOPs", {"exponentformat": "power"})


def _flops(run: Run) -> float | None:
    per_token, tokens = run.number("flops_per_token"), run.number("tokens")
    return per_token * tokens if per_token and tokens else None


def _seconds(run: Run) -> float | None:
    return run.number("train_seconds") or run.number("wall_seconds")


def against_time(study: Study, metric: str, words: str) -> Figure:
    """The metric over the time inside training steps."""
    longest = max((_seconds(run) or 0.0 for run in study.runs), default=0.0)
    unit, size = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    note = "Time inside training steps on this machine; see the spread of the throughput before believing in it."

    def scaled(run: Run) -> float | None:
        seconds = _seconds(run)
        return seconds / size if seconds else None

    return _scatter(
        Figure("time", f"Against time: {words}", note), study, metric, words, scaled, f"{unit} of training", {}
    )


def _scatter(
    figure: Figure,
    study: Study,
    metric: str,
    words: str,
    cost: Callable[[Run], float | None],
    title: str,
    axis: dict[str, Any],
) -> Figure:
    looks = styles(study.variants, (study.sweep or {}).get("baseline"))
    for name in study.variants:
        found = [(run, cost(run), run.number(metric)) for run in study.of(name) if run.state == "done"]
        points = [(run, x, y) for run, x, y in found if x is not None and y is not None]
        if points:
            runs, xs, ys = [p[0] for p in points], [p[1] for p in points], [p[2] for p in points]
            figure.traces += _marks(name, looks[name], runs, xs, ys, (sum(xs) / len(xs), sum(ys) / len(ys)))
    if not figure.traces:
        figure.missing = "No run has finished yet, so there is nothing to set against its cost."
        return figure
    figure.layout = {
        "xaxis": {"title": {"text": title}, **axis, **_room(figure.traces)},
        "yaxis": {"title": {"text": words}},
    }
    figure.note += " Small marks are runs, large hollow ones means over the seeds."
    return figure


def _room(traces: list[Trace]) -> dict[str, Any]:
    """Limits for costs that are all but equal, where plotly would show the last digits of a rounding error."""
    costs = [x for trace in traces for x in trace["x"]]
    middle = (min(costs) + max(costs)) / 2
    return {"range": [0.95 * middle, 1.05 * middle]} if max(costs) - min(costs) < 0.02 * middle else {}


def _marks(name: str, look: Style, runs: list[Run], x: list[Any], y: list[Any], mean: tuple[Any, Any]) -> list[Trace]:
    common = {"type": "scatter", "mode": "markers", "legendgroup": name, "name": brief(name)}
    small = {"symbol": look.marker, "size": 6, "color": look.faint(0.6)}
    large = {"symbol": f"{look.marker}-open", "size": 14, "color": look.colour, "line": {"width": 2.2}}
    told = [f"{plain(name)}, seed {run.seed}" for run in runs]
    hover = "%{text}<br>%{x:,.5~g}: %{y:.5~g}<extra></extra>"
    return [
        {**common, "x": x, "y": y, "marker": small, "text": told, "hovertemplate": hover, "showlegend": False},
        {
            **common,
            "x": [mean[0]],
            "y": [mean[1]],
            "marker": large,
            "text": [f"{plain(name)}, mean of {len(runs)}"],
            "hovertemplate": hover,
        },
    ]
