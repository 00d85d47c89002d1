"""The figures over training: columns of `metrics.csv`, a line for each variant."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from core.reports.curves import Curve, axis_of, curve, end_of
from core.reports.figure import Figure, Trace
from core.reports.points import at_the_end, validated_once
from core.reports.study_files import Run, Study
from core.reports.style import DASHES, Style, brief, plain, styles
from core.reports.words import LOSS

MARKS = 10
"""The approximate number of marked points of a long line; each line marks other points."""
ALL_MARKED = 40
"""The largest number of points for which a line marks every point."""
STEEP = 0.1
"""The first part of training, as a fraction: if its steep fall would flatten the rest, it is left outside the frame."""


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
        whole: the curve of all finished runs together.
        parts: the curve of each run that has not finished, or failed.
    """

    line: Line
    whole: Curve | None
    parts: list[tuple[Run, Curve]]

    @property
    def curves(self) -> list[Curve]:
        """The curve of the finished runs, if there is one, and those of the others."""
        found = [part for _, part in self.parts]
        if self.whole:
            return [self.whole, *found]
        return found

    @property
    def last(self) -> float:
        """The value at which the line ends; the highest one if it is only single runs."""
        if self.whole:
            return self.whole.mean[-1]
        return max(part.mean[-1] for _, part in self.parts)

    def traces(self, rank: int, *, band: bool = True) -> list[Trace]:
        """A band over the seeds, their mean, and a thin line for each single run; one entry in the legend.

        Args:
            rank: the place in the legend.
            band: whether the band is drawn.
        """
        common = {
            "type": "scatter",
            "legendgroup": self.line.name,
            "legendrank": 1000 + rank,
            "name": brief(self.line.name),
            "mode": "lines+markers",
        }
        traces: list[Trace] = []
        if self.whole:
            if max(self.whole.seeds) > 1 and band:
                traces.append(common | _band(self.whole, self.line.style))
            traces.append(common | self._mean(self.whole))
        for index, (run, part) in enumerate(self.parts):
            in_legend = self.whole is None and index == 0
            traces.append(common | self._single(run, part) | {"showlegend": in_legend})
        return traces

    def _mean(self, whole: Curve) -> Trace:
        """A thick line for the mean of the finished runs."""
        seeds = max(whole.seeds)
        text = plain(self.line.name)
        if seeds > 1:
            text += f"<br>mean of {seeds} seeds"
        look = {"line": self._pen(2.2), "marker": self._marker(8)}
        return _path(whole) | look | _hover(text)

    def _single(self, run: Run, part: Curve) -> Trace:
        """A thin line for one run."""
        text = f"{plain(self.line.name)}<br>seed {run.seed}, {plain(run.state)}"
        look = {"line": self._pen(1), "marker": self._marker(5)}
        return _path(part) | look | _hover(text)

    def _pen(self, width: float) -> Trace:
        return {"color": self.line.style.colour, "dash": self.line.style.dash, "width": width}

    def _marker(self, size: int) -> Trace:
        longest = max(len(found.x) for found in self.curves)
        most = MARKS
        if longest <= ALL_MARKED:
            most = 0  # plotly marks every point
        look = self.line.style
        return {"symbol": look.marker, "color": look.colour, "maxdisplayed": most, "size": size}


def _path(curve: Curve) -> Trace:
    return {"x": curve.x, "y": curve.mean}


def _band(curve: Curve, look: Style) -> Trace:
    """A filled area from the lowest seed to the highest."""
    return {
        "x": curve.x + curve.x[::-1],
        "y": curve.high + curve.low[::-1],
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": look.faint(0.12),
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _hover(text: str) -> Trace:
    """What the pointer shows. The text is in `meta`, where nothing in it is taken for a placeholder."""
    return {"meta": text, "hovertemplate": "%{meta}<br>%{x:,.4~g}: %{y:.5~g}<extra></extra>"}


BY_SOURCE = "/source/"
"""What the name of a column holds that is about one part of a mixture."""


class OverTraining:
    """Draws columns of `metrics.csv` over training.

    A band spans a variant's finished seeds; a run that has not finished is a thin line of its own, because a mean over
    fewer and fewer seeds would bend where one ends.
    """

    def __init__(self, study: Study, axis: str | None = None) -> None:
        self.study = study
        self.axis = axis or axis_of(study.runs)
        self.end = end_of(study.runs, self.axis)
        self.styles = styles(study.variants, (study.sweep or {}).get("baseline"))

    def lines(self, column: str, suffix: str = "") -> list[Line]:
        """A line for each variant over one column; the suffix is added to the names."""
        found = []
        for name in self.study.variants:
            runs = self.study.of(name)
            found.append(Line(name + suffix, runs, column, self.styles[name], name))
        return found

    def dashed_lines(self, by_suffix: Mapping[str, str]) -> list[Line]:
        """Lines over several columns, whose dashes stand for the column and not for a variant.

        Args:
            by_suffix: what is added to a variant's name, possibly nothing, and the column.
        """
        lines: list[Line] = []
        for (suffix, column), dash in zip(by_suffix.items(), cycle(DASHES), strict=False):
            for line in self.lines(column, suffix):
                look = replace(line.style, dash=dash) if suffix else line.style
                lines.append(replace(line, style=look))
        return lines

    def averages_of(self, column: str) -> dict[str, str]:
        """The columns with the same value of averaged weights, by what is added to a variant's name."""
        found: dict[str, str] = {}
        for run in self.study.runs:
            for name in run.metrics if run.metrics is not None else ():
                if name.endswith(f"/{column}") and run.has(name):
                    found[f", {name.removesuffix(f'/{column}')}"] = name
        return found

    def losses(self) -> list[Line]:
        """A line for each training loss of a single run."""
        columns = self.columns([LOSS, "loss/mtp/"])
        columns += [c for c in self.columns([""]) if BY_SOURCE in c and not c.startswith("val/")]
        looks = styles(columns, LOSS)
        found = []
        for column in columns:
            name = column.removeprefix("loss/")
            found.append(Line(name, self.study.runs, column, looks[column], column))
        return found

    def columns(self, prefixes: Iterable[str]) -> list[str]:
        """The columns that begin with one of the prefixes and have values in some run, sorted."""
        starts = tuple(prefixes)
        found: set[str] = set()
        for run in self.study.runs:
            if run.metrics is not None:
                found.update(c for c in run.metrics if c.startswith(starts) and run.has(c))
        return sorted(found)

    def figure(self, blank: Figure, lines: list[Line], *, y: str, bands: bool = True) -> Figure:
        """Fills a figure with the lines that have values; if none has, it is returned as it is.

        Args:
            blank: a figure whose `missing` says why it would be empty.
            lines: the lines to draw; the legend has them in the order in which they end, the highest first.
            y: title of the vertical axis.
            bands: whether bands over the seeds are drawn.
        """
        drawn = []
        for line in lines:
            found = Drawn(line, *self._curves(line))
            if found.curves:
                drawn.append(found)
        if not drawn:
            return blank
        drawn.sort(key=lambda found: -found.last)
        blank.missing = None
        for rank, found in enumerate(drawn):
            blank.traces += found.traces(rank, band=bands)
        axis = {"title": {"text": self.x_title}, "range": [0, 1.01 * self.end]}
        blank.layout = {"xaxis": axis, "yaxis": {"title": {"text": y}}} | blank.layout
        blank.note = " ".join(filter(None, [blank.note, *_reading(drawn, bands=bands)]))
        return blank

    @property
    def x_title(self) -> str:
        """The title of the horizontal axis."""
        return {"tokens": "training tokens", "step": "steps"}.get(self.axis, self.axis)

    def _curves(self, line: Line) -> tuple[Curve | None, list[tuple[Run, Curve]]]:
        """The curve of the finished runs together (all runs if there is no sweep), and those of the others."""
        done = []
        parts = []
        for run in line.runs:
            if run.state == "done" or self.study.sweep is None:
                done.append(run)
                continue
            part = curve([run], line.column, axis=self.axis, end=self.end)
            if part is not None:
                parts.append((run, part))
        return curve(done, line.column, axis=self.axis, end=self.end), parts


def _reading(drawn: list[Drawn], *, bands: bool) -> Iterable[str]:
    """Sentences on how to read the lines."""
    curves: list[Curve] = []
    for found in drawn:
        curves += found.curves
    every = max(curve.every for curve in curves)
    if every > 1:
        yield f"Each point is the mean of up to {every} steps."
    if any(max(curve.seeds) > 1 for curve in curves):
        about_bands = ""
        if bands:
            about_bands = ", bands reach from the lowest seed to the highest"
        yield f"Lines are means over the seeds{about_bands}."
    if any(found.parts for found in drawn):
        yield "Thin lines are single runs that have not finished, or failed."
    if len(drawn) > 1:
        yield "The legend is in the order in which the lines end."


def training_loss(over: OverTraining) -> Figure:
    """The training loss of each variant; the losses of all multi-token depths too if there is a single run.

    Several variants have no bands here: what a batch happens to hold is wider than what sets them apart, and
    `against_baseline` shows that.
    """
    missing = "No run has logged a training loss yet."
    figure = Figure("loss", "Training loss", smooth=True, missing=missing)
    lines = over.lines(LOSS)
    if over.study.sweep is None:
        lines = over.losses()
    over.figure(figure, lines, y="nats per token", bands=len(lines) == 1)
    return _framed(figure, over.end)


def _framed(figure: Figure, end: float) -> Figure:
    """Leaves the first steep fall above the frame, unless too little comes after it."""
    values = []
    late = []
    for trace in figure.traces:
        values += trace["y"]
        late += values_after(trace, STEEP * end)
    if len(late) < 20 or max(late) >= 0.95 * max(values):
        return figure
    margin = 0.04 * (max(late) - min(late))
    limits = [min(late) - margin, max(late) + margin]
    figure.layout["yaxis"] |= {"range": limits, "autorange": False}
    figure.note += (
        f" The first {STEEP:.0%} lie above the frame: double-click the figure to see all."
    )
    return figure


def values_after(trace: Trace, start: float) -> list[float]:
    """The values of a trace whose place on the horizontal axis is above `start`."""
    return [y for x, y in zip(trace["x"], trace["y"], strict=True) if x > start]


def validation(over: OverTraining, metric: str, words: str) -> Figure:
    """The metric at each validation, of averaged weights too; bits per byte where validation does not give it."""
    column = "val_bits_per_byte"
    if any(run.has(metric) for run in over.study.runs):
        column = metric
    title = "validation bits per byte"
    if column == metric:
        title = words
    missing = "No run has been validated yet."
    blank = Figure("validation", f"Over training: {title}", missing=missing)
    columns = {"": column, **over.averages_of(column)}
    if len(over.study.runs) == 1:
        for of_source in over.columns([f"{column}/"]):  # the parts of a mixture
            columns[f", {of_source.removeprefix(f'{column}/')}"] = of_source
    if validated_once(over.study, list(columns.values())):
        return at_the_end(replace(blank, title=title.capitalize()), over.study, columns, title)
    return _framed(over.figure(blank, over.dashed_lines(columns), y=title), over.end)


def violation(over: OverTraining) -> Figure:
    """MaxVio over training: how uneven the load of the experts was."""
    blank = Figure(
        "maxvio",
        "MaxVio: how uneven the experts' load is",
        "(Largest load − mean) / mean of each step, averaged over the layers: 0 is uniform.",  # noqa: RUF001
        smooth=True,
        missing="No run has logged an expert's load: there are no expert layers, or no step has been done.",
    )
    figure = over.figure(blank, over.lines("load/max_vio_batch"), y="MaxVio of the step")
    values = []
    for trace in figure.traces:
        values += trace["y"]
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 20 * min(positive):
        figure.layout["yaxis"] |= _log_axis(min(positive), max(positive))
        figure.note += " The vertical axis is logarithmic"
        if len(positive) < len(values):
            figure.note += ", so a MaxVio of 0 is below it."
        else:
            figure.note += "."
    elif positive:
        figure.layout["yaxis"] |= {"rangemode": "tozero"}
    return figure


def _log_axis(lowest: float, highest: float) -> dict[str, Any]:
    """A logarithmic axis with marks at 1, 2 and 5 of each decade; at 1 alone if it spans more than three decades."""
    factors: tuple[int, ...] = (1, 2, 5)
    if highest >= 1e3 * lowest:
        factors = (1,)
    ticks = [factor * 10.0**decade for decade in range(-6, 7) for factor in factors]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def acceptance(over: OverTraining) -> Figure:
    """How often the multi-token depths agree with the main model."""
    blank = Figure(
        "mtp",
        "Multi-token prediction: acceptance",
        "How often a depth's most likely token is the main model's, over the held-out split.",
        missing="No run has a multi-token module that has been validated.",
    )
    columns = over.columns(["val/mtp/acceptance_"])
    by_suffix = {}
    for column in columns:
        suffix = ""
        if len(columns) > 1:
            suffix = f", depth {_depth(column)}"
        by_suffix[suffix] = column
    if validated_once(over.study, columns):
        return at_the_end(blank, over.study, by_suffix, "fraction")
    figure = over.figure(blank, over.dashed_lines(by_suffix), y="fraction")
    if len(columns) == 1 and not figure.missing:
        figure.note = f"Depth {_depth(columns[0])}. {figure.note}"
    return figure


def _depth(column: str) -> str:
    return column.rpartition("_")[2]


def speed(over: OverTraining) -> Figure:
    """The tokens per second of one run over training."""
    blank = Figure(
        "throughput", "Throughput", smooth=True, missing="No throughput has been logged yet."
    )
    figure = over.figure(blank, over.lines("tokens_per_second"), y="tokens per second")
    if not figure.missing:
        figure.layout["yaxis"] |= {"rangemode": "tozero"}
    return figure
