"""The figures over training: columns of `metrics.csv`, a line for each variant."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import cycle

from core.analysis.report.curves import Curve, axis_of, curve, reach
from core.analysis.report.figure import Figure, Trace
from core.analysis.report.folder import Run, Study
from core.analysis.report.points import at_the_end, validated_once
from core.analysis.report.style import DASHES, Style, brief, plain, styles


@dataclass(frozen=True)
class Line:
    """A line of a figure over training: a column of one variant's runs."""

    name: str
    runs: list[Run]
    column: str
    style: Style
    group: str


class OverTraining:
    """Draws columns of `metrics.csv` over training.

    A band spans a variant's finished seeds; a run that has not finished is a thin line of its own, because a mean over
    fewer and fewer seeds would bend where one ends.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.axis = axis_of(study.runs)
        self.end = reach(study.runs, self.axis)
        self.styles = styles(study.variants, (study.sweep or {}).get("baseline"))

    def lines(self, column: str, suffix: str = "") -> list[Line]:
        """One column, a line for each variant."""
        return [
            Line(name + suffix, self.study.of(name), column, self.styles[name], name) for name in self.study.variants
        ]

    def columns(self, prefixes: Iterable[str]) -> list[str]:
        """The columns that some run has values in and whose name begins so, sorted."""
        named = {c for run in self.study.runs if run.metrics is not None for c in run.metrics}
        starts = tuple(prefixes)
        return sorted(c for c in named if c.startswith(starts) and any(run.has(c) for run in self.study.runs))

    def figure(self, blank: Figure, lines: list[Line], *, y: str, markers: bool = False) -> Figure:
        """Fill a figure; `missing` says why it would be empty, and is dropped where it is not."""
        drawn = [(line, *self._curves(line)) for line in lines]
        drawn = sorted((d for d in drawn if d[1] or d[2]), key=lambda d: -_last(d[1], d[2]))
        if not drawn:
            return blank
        blank.missing = None
        for rank, (line, whole, parts) in enumerate(drawn):
            blank.traces += _traces(line, whole, parts, rank, markers=markers)
        axis = {"title": {"text": self.x_title}, "range": [0, 1.01 * self.end]}
        blank.layout = {"xaxis": axis, "yaxis": {"title": {"text": y}}} | blank.layout
        blank.note = " ".join(filter(None, [blank.note, *self._reading(drawn)]))
        return blank

    @property
    def x_title(self) -> str:
        """What the figures run over."""
        return "training tokens" if self.axis == "tokens" else "steps"

    def _curves(self, line: Line) -> tuple[Curve | None, list[tuple[Run, Curve]]]:
        done = [run for run in line.runs if run.state == "done" or self.study.sweep is None]
        rest = [run for run in line.runs if run not in done]
        whole = curve(done, line.column, axis=self.axis, end=self.end)
        parts = [(run, curve([run], line.column, axis=self.axis, end=self.end)) for run in rest]
        return whole, [(run, part) for run, part in parts if part is not None]

    def _reading(self, drawn: list[tuple[Line, Curve | None, list[tuple[Run, Curve]]]]) -> Iterable[str]:
        curves = [c for _, whole, parts in drawn for c in (whole, *(part for _, part in parts)) if c]
        every = max(c.every for c in curves)
        if every > 1:
            yield f"Each point is the mean of up to {every} steps."
        if any(max(c.seeds) > 1 for c in curves):
            yield "Lines are means over the seeds, bands reach from the lowest seed to the highest."
        if any(parts for _, _, parts in drawn):
            yield "Thin lines are single runs that have not finished, or failed."
        if len(drawn) > 1:
            yield "The legend is in the order in which the lines end."


def _last(whole: Curve | None, parts: list[tuple[Run, Curve]]) -> float:
    return whole.mean[-1] if whole else max(part.mean[-1] for _, part in parts)


def _traces(
    line: Line, whole: Curve | None, parts: list[tuple[Run, Curve]], rank: int, *, markers: bool
) -> list[Trace]:
    common = {"type": "scatter", "legendgroup": line.name, "legendrank": 1000 + rank, "name": brief(line.name)}
    mode = "lines+markers" if markers else "lines"
    shape = {"symbol": line.style.marker, "size": 7, "color": line.style.colour}
    traces: list[Trace] = []
    if whole and max(whole.seeds) > 1:
        around = {"x": whole.x + whole.x[::-1], "y": whole.high + whole.low[::-1]}
        look = {"fill": "toself", "fillcolor": line.style.faint(0.12), "line": {"width": 0}, "mode": "lines"}
        traces.append({**common, **around, **look, "hoverinfo": "skip", "showlegend": False})
    if whole:
        pen = {"color": line.style.colour, "dash": line.style.dash, "width": 2.2}
        over = f"<br>mean of {max(whole.seeds)} seeds" if max(whole.seeds) > 1 else ""
        text = f"{plain(line.name)}{over}"
        traces.append(
            {**common, "x": whole.x, "y": whole.mean, "mode": mode, "line": pen, "marker": shape, **_hover(text)}
        )
    for index, (run, part) in enumerate(parts):
        pen = {"color": line.style.colour, "dash": line.style.dash, "width": 1}
        text = f"{plain(line.name)}<br>seed {run.seed}, {plain(run.state)}"
        first = whole is None and index == 0
        thin = {"x": part.x, "y": part.mean, "mode": mode, "line": pen, "marker": {**shape, "size": 5}}
        traces.append({**common, **thin, **_hover(text), "showlegend": first})
    return traces


def _hover(text: str) -> Trace:
    """What a pointer is told; the text stands in `meta`, where nothing in it is taken for a placeholder."""
    return {"meta": text, "hovertemplate": "%{meta}<br>%{x:,.4~g}: %{y:.5~g}<extra></extra>"}


def training_loss(over: OverTraining) -> Figure:
    """The loss that was trained on; for one run with the depths beside it."""
    figure = Figure("loss", "Training loss", missing="No run has logged a training loss yet.")
    lines = over.lines("loss/next_token")
    if over.study.sweep is None:
        columns = over.columns(["loss/next_token", "loss/mtp/"])
        looks = styles(columns, "loss/next_token")
        lines = [Line(c.removeprefix("loss/"), over.study.runs, c, looks[c], c) for c in columns]
    figure = over.figure(figure, lines, y="nats per token")
    limits = _without_start(figure, over.end)
    if limits:
        figure.layout["yaxis"] |= {"range": limits, "autorange": False}
        figure.note += " The first 4% lie above the frame: double-click the figure to see all."
    return figure


def _without_start(figure: Figure, end: float) -> list[float] | None:
    """Limits that leave the first steep fall out; None where there is little after it."""
    points = [(x, y) for trace in figure.traces for x, y in zip(trace["x"], trace["y"], strict=True)]
    late = [y for x, y in points if x > 0.04 * end]
    if len(late) < 20 or max(late) >= 0.95 * max(y for _, y in points):
        return None
    room = 0.04 * (max(late) - min(late))
    return [min(late) - room, max(late) + room]


def validation(over: OverTraining, metric: str, words: str) -> Figure:
    """The metric at each validation; bits per byte where the metric is nothing that is validated."""
    column = metric if any(run.has(metric) for run in over.study.runs) else "val_bits_per_byte"
    title = words if column == metric else "validation bits per byte"
    blank = Figure("validation", f"Over training: {title}", missing="No run has been validated yet.")
    if validated_once(over.study, [column]):
        return at_the_end(replace(blank, title=title.capitalize()), over.study, {"": column}, title)
    figure = over.figure(blank, over.lines(column), y=title, markers=True)
    limits = _without_start(figure, over.end)
    if limits:
        figure.layout["yaxis"] |= {"range": limits, "autorange": False}
        figure.note += " The first 4% lie above the frame: double-click the figure to see all."
    return figure


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
    figure = over.figure(blank, lines, y="fraction", markers=True)
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
