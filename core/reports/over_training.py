"""The figures over training: columns of `metrics.csv`, a line for each variant."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import cycle

from core.reports.curves import Curve, axis_of, curve, reach
from core.reports.figure import Figure, Trace
from core.reports.folder import Run, Study
from core.reports.points import at_the_end, validated_once
from core.reports.style import DASHES, Style, brief, plain, styles
from core.reports.words import LOSS

MARKS, ALL_MARKED = 10, 40
"""About how many points of a line are marked, each line's at others; and up to how many all of them are."""
STEEP = 0.1
"""Of training: how much of it is left above the frame where the rest would be flattened."""


@dataclass(frozen=True)
class Line:
    """A line of a figure over training: a column of one variant's runs."""

    name: str
    runs: list[Run]
    column: str
    style: Style
    group: str


@dataclass(frozen=True)
class Drawn:
    """A line with its curves.

    Args:
        whole: of the finished runs together.
        parts: of each run that has not finished, or failed.
    """

    line: Line
    whole: Curve | None
    parts: list[tuple[Run, Curve]]

    @property
    def curves(self) -> list[Curve]:
        """All that there are."""
        return [*([self.whole] if self.whole else []), *(part for _, part in self.parts)]

    @property
    def last(self) -> float:
        """Where it ends."""
        return self.whole.mean[-1] if self.whole else max(part.mean[-1] for _, part in self.parts)

    def traces(self, rank: int, *, band: bool = True) -> list[Trace]:
        """A band, a line and thin lines, which the legend takes for one."""
        name, look = self.line.name, self.line.style
        common = {"type": "scatter", "legendgroup": name, "legendrank": 1000 + rank, "name": brief(name)}
        common |= {"mode": "lines+markers"}
        few = max(len(found.x) for found in self.curves) <= ALL_MARKED
        mark = {"symbol": look.marker, "color": look.colour, "maxdisplayed": 0 if few else MARKS}
        pen = {"color": look.colour, "dash": look.dash}
        traces: list[Trace] = []
        if self.whole:
            seeds = max(self.whole.seeds)
            if seeds > 1 and band:
                traces.append(common | _band(self.whole, look))
            text = plain(name) + (f"<br>mean of {seeds} seeds" if seeds > 1 else "")
            thick = {"line": pen | {"width": 2.2}, "marker": mark | {"size": 8}}
            traces.append(common | _path(self.whole) | thick | _hover(text))
        for index, (run, part) in enumerate(self.parts):
            thin = {"line": pen | {"width": 1}, "marker": mark | {"size": 5}}
            text = f"{plain(name)}<br>seed {run.seed}, {plain(run.state)}"
            first = self.whole is None and index == 0
            traces.append(common | _path(part) | thin | _hover(text) | {"showlegend": first})
        return traces


def _path(curve: Curve) -> Trace:
    return {"x": curve.x, "y": curve.mean}


def _band(curve: Curve, look: Style) -> Trace:
    around = {"x": curve.x + curve.x[::-1], "y": curve.high + curve.low[::-1], "mode": "lines", "line": {"width": 0}}
    return around | {"fill": "toself", "fillcolor": look.faint(0.12), "hoverinfo": "skip", "showlegend": False}


def _hover(text: str) -> Trace:
    """What a pointer is told; the text stands in `meta`, where nothing in it is taken for a placeholder."""
    return {"meta": text, "hovertemplate": "%{meta}<br>%{x:,.4~g}: %{y:.5~g}<extra></extra>"}


class OverTraining:
    """Draws columns of `metrics.csv` over training.

    A band spans a variant's finished seeds; a run that has not finished is a thin line of its own, because a mean over
    fewer and fewer seeds would bend where one ends.
    """

    def __init__(self, study: Study, axis: str | None = None) -> None:
        self.study = study
        self.axis = axis or axis_of(study.runs)
        self.end = reach(study.runs, self.axis)
        self.styles = styles(study.variants, (study.sweep or {}).get("baseline"))

    def lines(self, column: str, suffix: str = "") -> list[Line]:
        """One column, a line for each variant."""
        return [
            Line(name + suffix, self.study.of(name), column, self.styles[name], name) for name in self.study.variants
        ]

    def losses(self) -> list[Line]:
        """A single run's training losses, a line for each."""
        columns = self.columns([LOSS, "loss/mtp/"])
        looks = styles(columns, LOSS)
        return [Line(c.removeprefix("loss/"), self.study.runs, c, looks[c], c) for c in columns]

    def columns(self, prefixes: Iterable[str]) -> list[str]:
        """The columns that some run has values in and whose name begins so, sorted."""
        named = {c for run in self.study.runs if run.metrics is not None for c in run.metrics}
        starts = tuple(prefixes)
        return sorted(c for c in named if c.startswith(starts) and any(run.has(c) for run in self.study.runs))

    def figure(self, blank: Figure, lines: list[Line], *, y: str, bands: bool = True) -> Figure:
        """Fill a figure; `missing` says why it would be empty, and is dropped where it is not."""
        found = [Drawn(line, *self._curves(line)) for line in lines]
        drawn = sorted((d for d in found if d.whole or d.parts), key=lambda d: -d.last)
        if not drawn:
            return blank
        blank.missing = None
        for rank, one in enumerate(drawn):
            blank.traces += one.traces(rank, band=bands)
        axis = {"title": {"text": self.x_title}, "range": [0, 1.01 * self.end]}
        blank.layout = {"xaxis": axis, "yaxis": {"title": {"text": y}}} | blank.layout
        blank.note = " ".join(filter(None, [blank.note, *_reading(drawn, bands=bands)]))
        return blank

    @property
    def x_title(self) -> str:
        """What the figures run over."""
        return {"tokens": "training tokens", "step": "steps"}.get(self.axis, self.axis)

    def _curves(self, line: Line) -> tuple[Curve | None, list[tuple[Run, Curve]]]:
        done = [run for run in line.runs if run.state == "done" or self.study.sweep is None]
        rest = [run for run in line.runs if run not in done]
        whole = curve(done, line.column, axis=self.axis, end=self.end)
        parts = [(run, curve([run], line.column, axis=self.axis, end=self.end)) for run in rest]
        return whole, [(run, part) for run, part in parts if part is not None]


def _reading(drawn: list[Drawn], *, bands: bool) -> Iterable[str]:
    curves = [found for one in drawn for found in one.curves]
    every = max(c.every for c in curves)
    if every > 1:
        yield f"Each point is the mean of up to {every} steps."
    if any(max(c.seeds) > 1 for c in curves):
        reach_to = ", bands reach from the lowest seed to the highest" if bands else ""
        yield f"Lines are means over the seeds{reach_to}."
    if any(one.parts for one in drawn):
        yield "Thin lines are single runs that have not finished, or failed."
    if len(drawn) > 1:
        yield "The legend is in the order in which the lines end."


def training_loss(over: OverTraining) -> Figure:
    """The loss that was trained on; for one run with the depths beside it.

    Several variants have no bands here: what a batch happens to hold is wider than what sets them apart, and
    `against_baseline` shows that.
    """
    figure = Figure("loss", "Training loss", missing="No run has logged a training loss yet.")
    lines = over.lines(LOSS)
    if over.study.sweep is None:
        lines = over.losses()
    return _framed(over.figure(figure, lines, y="nats per token", bands=len(lines) == 1), over.end)


def _framed(figure: Figure, end: float) -> Figure:
    """Leave the first steep fall above the frame; not where there is little after it."""
    points = [(x, y) for trace in figure.traces for x, y in zip(trace["x"], trace["y"], strict=True)]
    late = [y for x, y in points if x > STEEP * end]
    if len(late) < 20 or max(late) >= 0.95 * max(y for _, y in points):
        return figure
    room = 0.04 * (max(late) - min(late))
    figure.layout["yaxis"] |= {"range": [min(late) - room, max(late) + room], "autorange": False}
    figure.note += f" The first {STEEP:.0%} lie above the frame: double-click the figure to see all."
    return figure


def validation(over: OverTraining, metric: str, words: str) -> Figure:
    """The metric at each validation; bits per byte where the metric is nothing that is validated."""
    column = metric if any(run.has(metric) for run in over.study.runs) else "val_bits_per_byte"
    title = words if column == metric else "validation bits per byte"
    blank = Figure("validation", f"Over training: {title}", missing="No run has been validated yet.")
    if validated_once(over.study, [column]):
        return at_the_end(replace(blank, title=title.capitalize()), over.study, {"": column}, title)
    return _framed(over.figure(blank, over.lines(column), y=title), over.end)


def violation(over: OverTraining) -> Figure:
    """How uneven the load was."""
    blank = Figure(
        "maxvio",
        "MaxVio: how uneven the experts' load is",
        "(Largest load − mean) / mean of each step, averaged over the layers: 0 is uniform.",  # noqa: RUF001
        missing="No run has logged an expert's load: there are no expert layers, or no step has been done.",
    )
    figure = over.figure(blank, over.lines("load/max_vio_batch"), y="MaxVio of the step")
    values = [y for trace in figure.traces for y in trace["y"] if y > 0]
    if values and max(values) > 20 * min(values):
        ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
        ticks = ticks if max(values) < 1e3 * min(values) else ticks[::3]
        figure.layout["yaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
        zeros = any(y <= 0 for trace in figure.traces for y in trace["y"])
        figure.note += " The vertical axis is logarithmic" + (", so a MaxVio of 0 is below it." if zeros else ".")
    elif values:
        figure.layout["yaxis"] |= {"rangemode": "tozero"}
    return figure


def acceptance(over: OverTraining) -> Figure:
    """How often the multi-token depths agree with the main model."""
    blank = Figure(
        "mtp",
        "Multi-token prediction: acceptance",
        "How often a depth's most likely token is the main model's, over the held-out split.",
        missing="No run has a multi-token module that has been validated.",
    )
    columns = over.columns(["val/mtp/acceptance_"])
    depths = {column: f", depth {column.rpartition('_')[2]}" if len(columns) > 1 else "" for column in columns}
    if validated_once(over.study, columns):
        return at_the_end(blank, over.study, {suffix: column for column, suffix in depths.items()}, "fraction")
    lines = []
    for (column, suffix), dash in zip(depths.items(), cycle(DASHES), strict=False):
        found = over.lines(column, suffix)
        lines += [replace(line, style=replace(line.style, dash=dash)) for line in found] if suffix else found
    figure = over.figure(blank, lines, y="fraction")
    if len(columns) == 1 and not figure.missing:
        figure.note = f"Depth {columns[0].rpartition('_')[2]}. {figure.note}"
    return figure


def speed(over: OverTraining) -> Figure:
    """One run's tokens per second over training."""
    blank = Figure("throughput", "Throughput", missing="No throughput has been logged yet.")
    figure = over.figure(blank, over.lines("tokens_per_second"), y="tokens per second")
    if not figure.missing:
        figure.layout["yaxis"] |= {"rangemode": "tozero"}
    return figure
