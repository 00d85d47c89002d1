"""The training loss minus the baseline's, seed by seed: what many curves on top of each other cannot show."""

from dataclasses import replace

from core.reports.curves import SMOOTH, paired
from core.reports.figure import Figure, Trace
from core.reports.over_training import STEEP, Drawn, Line, OverTraining
from core.reports.style import brief
from core.reports.words import LOSS

HEIGHT = 165
"""Pixels of one panel."""
ALONE = {"mode": "lines", "showlegend": False}
"""A line that has its panel to itself and its name above it."""


def against_baseline(over: OverTraining) -> Figure:
    """A panel for each variant, all with the same axes; a band reaches over its finished seeds."""
    baseline = str((over.study.sweep or {}).get("baseline"))
    figure = Figure("paired", f"Training loss minus that of {baseline}", height=HEIGHT)
    drawn = [one for name in over.study.variants if name != baseline if (one := _drawn(over, name, baseline))]
    if not drawn:
        figure.missing = f"No variant and {baseline} have logged a training loss with the same seed yet."
        return figure
    figure.panels = len(drawn)
    titles = []
    for number, one in enumerate(drawn, start=1):
        axes = {"xaxis": f"x{number}", "yaxis": f"y{number}"} if number > 1 else {}
        figure.traces += [trace | axes | ALONE for trace in one.traces(number)]
        titles.append(_title(brief(one.line.name), str(number) if number > 1 else ""))
    limits = _limits(figure.traces, over.end)
    frame = {"range": limits, "autorange": False} if limits else {}
    figure.layout = {
        "xaxis": {"title": {"text": over.x_title}, "range": [0, 1.01 * over.end]},
        "yaxis": {"title": {"text": "nats per token"}, "zeroline": True, **frame},
        "annotations": titles,
    }
    figure.note = _note(over, baseline, drawn)
    return figure


def _drawn(over: OverTraining, name: str, baseline: str) -> Drawn | None:
    theirs = {run.seed: run for run in over.study.of(baseline)}
    pairs = [(run, theirs[run.seed]) for run in over.study.of(name) if run.seed in theirs]
    done = [pair for pair in pairs if all(run.state == "done" for run in pair)]
    whole = paired(done, LOSS, axis=over.axis, end=over.end)
    rest = [(pair[0], paired([pair], LOSS, axis=over.axis, end=over.end)) for pair in pairs if pair not in done]
    parts = [(run, part) for run, part in rest if part]
    line = Line(name, over.study.of(name), LOSS, replace(over.styles[name], dash="solid"), name)
    return Drawn(line, whole, parts) if whole or parts else None


def _title(text: str, number: str) -> Trace:
    """Above the panel of that number."""
    place = {"xref": f"x{number} domain", "yref": f"y{number} domain", "x": 0, "y": 1}
    return place | {"xanchor": "left", "yanchor": "bottom", "showarrow": False, "text": f"<b>{text}</b>"}


def _limits(traces: list[Trace], end: float) -> list[float] | None:
    """Of all panels, 0 among them, from what follows the first steps."""
    late = [y for t in traces for x, y in zip(t["x"], t["y"], strict=True) if x > STEEP * end]
    if not late:
        return None
    low, high = min(0.0, *late), max(0.0, *late)
    room = 0.06 * (high - low) or 1e-3
    return [low - room, high + room]


def _note(over: OverTraining, baseline: str, drawn: list[Drawn]) -> str:
    told = [
        f"Below 0 is better than {baseline}. Each run is held against that of the same seed, which reads the same "
        f"tokens, in {SMOOTH} parts of training. Lines are means over the seeds, bands reach from the lowest seed's "
        "difference to the highest; differences in the first tenth may lie outside the frame."
    ]
    if any(one.parts for one in drawn):
        told.append("Thin lines are single seeds of which a run has not finished, or failed.")
    finished = [run for run in over.study.runs if run.state == "done" and run.has(over.axis)]
    lengths = [run.metrics[over.axis].max() for run in finished]
    if lengths and min(lengths) < 0.99 * max(lengths):
        told.append("The runs are of unequal length, so where one ends the learning rate of another is still high.")
    return " ".join(told)
