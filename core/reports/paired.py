"""The figure of the training loss minus the baseline's, seed by seed, which curves on top of each other hide."""

from dataclasses import replace

from core.reports.curves import SMOOTH, paired
from core.reports.figure import Figure, Trace
from core.reports.over_training import STEEP, Drawn, Line, OverTraining, values_after
from core.reports.style import brief
from core.reports.words import LOSS

HEIGHT = 165
"""Pixels of one panel."""
ALONE = {"mode": "lines", "showlegend": False}
"""A line that has its panel to itself and its name above it."""


def against_baseline(over: OverTraining) -> Figure:
    """A panel for each variant, all with the same axes; a band reaches over the variant's finished seeds."""
    baseline = str((over.study.sweep or {}).get("baseline"))
    figure = Figure("paired", f"Training loss minus that of {baseline}", height=HEIGHT)
    drawn = []
    for name in over.study.variants:
        if name != baseline:
            found = _drawn(over, name, baseline)
            if found.curves:
                drawn.append(found)
    if not drawn:
        figure.missing = (
            f"No variant and {baseline} have logged a training loss with the same seed yet."
        )
        return figure
    figure.panels = len(drawn)
    titles = []
    for panel, found in enumerate(drawn, start=1):
        number = ""  # plotly's name of the first panel's axes
        axes = {}
        if panel > 1:
            number = str(panel)
            axes = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        for trace in found.traces(panel):
            figure.traces.append(trace | axes | ALONE)
        titles.append(_title(brief(found.line.name), number))
    y_axis: Trace = {"title": {"text": "nats per token"}, "zeroline": True}
    limits = _limits(figure.traces, over.end)
    if limits:
        y_axis |= {"range": limits, "autorange": False}
    figure.layout = {
        "xaxis": {"title": {"text": over.x_title}, "range": [0, 1.01 * over.end]},
        "yaxis": y_axis,
        "annotations": titles,
    }
    figure.note = _note(over, baseline, drawn)
    return figure


def _drawn(over: OverTraining, name: str, baseline: str) -> Drawn:
    """The line of a variant minus the baseline's: finished pairs of runs together, the other pairs one by one."""
    by_seed = {run.seed: run for run in over.study.of(baseline)}
    done = []
    parts = []
    for run in over.study.of(name):
        partner = by_seed.get(run.seed)
        if partner is None:
            continue
        pair = (run, partner)
        if run.state == "done" and partner.state == "done":
            done.append(pair)
            continue
        part = paired([pair], LOSS, axis=over.axis, end=over.end)
        if part is not None:
            parts.append((run, part))
    whole = paired(done, LOSS, axis=over.axis, end=over.end)
    look = replace(over.styles[name], dash="solid")
    return Drawn(Line(name, over.study.of(name), LOSS, look, name), whole, parts)


def _title(text: str, number: str) -> Trace:
    """A title above the panel of that number, which is empty for the first one."""
    return {
        "xref": f"x{number} domain",
        "yref": f"y{number} domain",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "text": f"<b>{text}</b>",
    }


def _limits(traces: list[Trace], end: float) -> list[float] | None:
    """Limits of the vertical axis of all panels, around 0 and the values after the first steps; None without values."""
    late = []
    for trace in traces:
        late += values_after(trace, STEEP * end)
    if not late:
        return None
    low = min(0.0, *late)
    high = max(0.0, *late)
    margin = 0.06 * (high - low) or 1e-3
    return [low - margin, high + margin]


def _note(over: OverTraining, baseline: str, drawn: list[Drawn]) -> str:
    sentences = [
        f"Below 0 is better than {baseline}. Each run is compared with that of the same seed, which reads the same "
        f"tokens, in {SMOOTH} parts of training. Lines are means over the seeds, bands reach from the lowest seed's "
        "difference to the highest; differences in the first tenth may lie outside the frame."
    ]
    if any(found.parts for found in drawn):
        sentences.append("Thin lines are single seeds of which a run has not finished, or failed.")
    finished = [run for run in over.study.runs if run.state == "done" and run.has(over.axis)]
    lengths = [run.metrics[over.axis].max() for run in finished]
    if lengths and min(lengths) < 0.99 * max(lengths):
        sentences.append(
            "The runs are of unequal length, so where one ends the learning rate of another is still high."
        )
    return " ".join(sentences)
