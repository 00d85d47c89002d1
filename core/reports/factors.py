"""The factor view of a sweep's grid: tests, effects with their intervals, and means of two keys together."""

from dataclasses import dataclass
from typing import Any

from core.reports.figure import Figure
from core.reports.points import row_axis, row_height
from core.reports.study_files import Study
from core.reports.style import brief, plain, styles, with_line_breaks
from core.reports.table import Cell, Column, Table, p_value
from core.reports.tolerant import list_of, section
from core.reports.words import number
from core.storage.documents import finite_number

MOST_PAIRS = 6
"""The most pairs of keys whose means are drawn."""


@dataclass(frozen=True)
class FactorReport:
    """The factor view as the page shows it.

    Args:
        table: the tests.
        notes: how the effects were estimated, and what a reader must know.
        missing: why there is no model; None if there is one.
    """

    table: Table | None
    notes: list[str]
    missing: str | None


COLUMNS = [
    Column("factor", "", "a key of the grid, or two of them"),
    Column("F", "", "the F test that none of its values has an effect"),
    Column("degrees of freedom", "", "of the factor, and of the residual"),
    Column("p", "", "of that test"),
    Column("Holm p", "", "corrected for the number of tests"),
]


def factor_report(study: Study) -> FactorReport | None:
    """The tests and notes of the factor view; None if the sweep has none."""
    view = section(study.results, "factors")
    if not view:
        return None
    if view.get("missing") or not _terms(study):
        return FactorReport(None, [], str(view.get("missing") or "it could not be read"))
    names = _short_names(view)
    rows = []
    for term in _terms(study):
        f, p, p_holm = (finite_number(term.get(key)) for key in ("f", "p", "p_holm"))
        name = " × ".join(names.get(key, key) for key in term["factors"])  # noqa: RUF001
        df = f"{number(finite_number(term.get('df')), 0)}, {number(finite_number(view.get('df')), 0)}"
        cells = [Cell(name, value=name, kind="name"), Cell(number(f, 2), value=f), Cell(df)]
        rows.append([*cells, Cell(p_value(p), value=p), Cell(p_value(p_holm), value=p_holm)])
    sentence = str(view.get("model") or "")
    notes = [f"{sentence[:1].upper()}{sentence[1:]}."]
    spread = finite_number(view.get("residual_sd"))
    if spread is not None:
        notes.append(f"The standard deviation of a run's error is {number(spread)}.")
    notes += [f"{str(note)[:1].upper()}{str(note)[1:]}." for note in list_of(view, "notes")]
    return FactorReport(Table(COLUMNS, rows), notes, None)


def factor_figures(study: Study, metric: str) -> list[Figure]:
    """The effects of single values, and the means of two keys together; none without a factor view.

    Args:
        study: a sweep.
        metric: the words for the metric.
    """
    terms = _terms(study)
    if not terms:
        return []
    names = _short_names(section(study.results, "factors"))
    found = [_effects([term for term in terms if len(term["factors"]) == 1], names, metric)]
    pairs = [term for term in terms if len(term["factors"]) == 2]
    for index, term in enumerate(pairs[:MOST_PAIRS]):
        found.append(_together(term, index, names, metric))
    return found


def _effects(terms: list[dict[str, Any]], names: dict[str, str], metric: str) -> Figure:
    """A mark with its interval for each value of each key."""
    figure = Figure("factors", f"What each value of the grid does to {metric}")
    looks = styles([term["factors"][0] for term in terms], None)
    labels: list[str] = []
    for term in terms:
        key = term["factors"][0]
        colour = looks[key].colour
        for effect in term["effects"]:
            labels.append(f"{names[key]} = {effect['values'][0]}")
            trace = {
                "type": "scatter",
                "mode": "markers",
                "name": plain(labels[-1]),
                "showlegend": False,
                "x": [effect["effect"]],
                "y": [with_line_breaks(labels[-1])],
                "marker": {"symbol": looks[key].marker, "size": 11, "color": colour},
                "meta": plain(labels[-1]),
                "hovertemplate": "%{meta}<br>%{x:+.4~g}<extra></extra>",
            }
            if effect["low"] is not None:
                above = effect["high"] - effect["effect"]
                below = effect["effect"] - effect["low"]
                bar = {"type": "data", "array": [above], "arrayminus": [below]}
                trace["error_x"] = {**bar, "thickness": 2, "width": 6, "color": colour}
            figure.traces.append(trace)
    figure.layout = {**row_axis(labels)}
    figure.height = row_height(labels)
    figure.layout["xaxis"] = {"title": {"text": "effect on the mean"}}
    figure.note = (
        "The effect of a value is how far the mean of its points lies from the mean of all points, here with its 95% "
        "interval, which is not corrected for the number of values."
    )
    return figure


def _together(term: dict[str, Any], index: int, names: dict[str, str], metric: str) -> Figure:
    """The means of two keys: the first one's values across, and a line for each value of the second."""
    first, second = (names[key] for key in term["factors"])
    title = f"{first} and {second} together"
    figure = Figure(f"interaction-{index}", title, height=280)
    lines: dict[str, list[tuple[str, float]]] = {}
    for effect in term["effects"]:
        place, line = effect["values"]
        lines.setdefault(f"{second} = {line}", []).append((place, effect["mean"]))
    looks = styles(list(lines), None)
    for name, points in lines.items():
        look = looks[name]
        figure.traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": brief(name),
                "x": [with_line_breaks(place, 11) for place, _ in points],
                "y": [mean for _, mean in points],
                "line": {"color": look.colour, "dash": look.dash, "width": 2.2},
                "marker": {"symbol": look.marker, "color": look.colour, "size": 9},
                "meta": plain(name),
                "hovertemplate": "%{x}, %{meta}<br>%{y:.5~g}<extra></extra>",
            }
        )
    figure.layout = {
        "xaxis": {
            "type": "category",
            "title": {"text": plain(first)},
            "nticks": 0,
            "range": [-0.45, max(len(points) for points in lines.values()) - 0.55],
        },
        "yaxis": {"title": {"text": metric}},
    }
    figure.note = (
        "Means over the seeds and the other keys. Parallel lines: the keys do not interact."
    )
    return figure


def _short_names(view: dict[str, Any]) -> dict[str, str]:
    """The last part of each key, without `name`; the whole key where two would be alike."""
    keys = [str(key) for key in list_of(view, "factors")]
    ends = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    names = {}
    for key, end in zip(keys, ends, strict=True):
        names[key] = end if ends.count(end) == 1 else key
    return names


def _terms(study: Study) -> list[dict[str, Any]]:
    """The terms of the view that are whole: their factors are known, and their effects are numbers."""
    view = section(study.results, "factors")
    known = _short_names(view)
    found = []
    for term in list_of(view, "terms"):
        if not isinstance(term, dict) or not all(f in known for f in list_of(term, "factors")):
            continue
        count = len(list_of(term, "factors"))
        effects = [_effect(one, count) for one in list_of(term, "effects")]
        whole = [one for one in effects if one is not None]
        if count in (1, 2) and whole and len(whole) == len(effects):
            found.append({**term, "effects": whole})
    return found


def _effect(effect: Any, count: int) -> dict[str, Any] | None:
    """An effect whose numbers are numbers; None for anything else.

    Args:
        effect: its entry.
        count: the number of its factors; the effect of two must have a mean.
    """
    if not isinstance(effect, dict):
        return None
    values = [str(value) for value in list_of(effect, "values")]
    numbers = {key: finite_number(effect.get(key)) for key in ("mean", "effect", "low", "high")}
    if (
        len(values) != count
        or numbers["effect"] is None
        or (count == 2 and numbers["mean"] is None)
    ):
        return None
    if numbers["low"] is None or numbers["high"] is None:
        numbers |= {"low": None, "high": None}
    return {"values": values, **numbers}
