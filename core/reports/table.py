"""The tables: results, every run, what differs between the recipes, key numbers of one run."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from core.analysis.compare_recipes import short
from core.reports.study_files import Run, Study
from core.reports.words import NONE, duration, number, signed, verdict_notes, yes_no
from core.storage.documents import finite_number


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what is shown.
        under: a second, smaller line.
        value: sorts the rows; a cell without one goes last.
        kind: a class of the style sheet.
    """

    text: str
    under: str = ""
    value: float | str | None = None
    kind: str = "number"


@dataclass(frozen=True)
class Column:
    """One column: its heading, the group that it belongs to, and what it means."""

    title: str
    group: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells.

    Args:
        cut: the number of columns after which it is cut in two for paper, on which nothing scrolls; the first column
            is in both. No group of columns is cut.
    """

    columns: list[Column]
    rows: list[list[Cell]]
    cut: int | None = None

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups of neighbouring columns: the name of each and how many columns it has."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found


COLUMNS = [
    Column("variant", "", "the first column; sort by any heading"),
    Column(
        "verdict",
        "result",
        "better or worse only where the interval leaves out 0 and Holm's p is below 0.05",
    ),
    Column("seeds", "result", "finished runs with a value"),
    Column("mean", "result", "mean over seeds, with its 95% interval by Student's t"),
    Column(
        "difference",
        "result",
        "to the baseline, mean of the seeds' differences, with its 95% interval",
    ),
    Column(
        "effect size",
        "result",
        "mean difference / standard deviation of the differences (Cohen's d_z)",
    ),
    Column("Holm p", "result", "p of a paired t test, corrected for the number of variants"),
    Column("params", "model", "of the main model"),
    Column("active", "model", "parameters used by one token"),
    Column("FLOPs/token", "model", "training, forward and backward"),
    Column("KV bytes", "model", "of cache per token"),
    Column("capacity", "routing", "what an expert takes at most, over its even share"),
    Column("drops", "routing", "whether assignments may be dropped in training"),
    Column("causal", "routing", "no output depends on a later token"),
    Column("MaxVio", "measured", "over the held-out split, mean over seeds"),
    Column("dropped", "measured", "fraction of assignments not carried out, mean over seeds"),
    Column("tokens/s", "measured", "mean over seeds, from the slowest to the fastest run"),
]


def results_table(study: Study) -> Table:
    """A row for each variant."""
    sweep = study.sweep or {}
    found = {str(row.get("variant")): row for row in study.results.get("rows") or []}
    facts = {str(variant["name"]): variant for variant in sweep.get("variants") or []}
    decimals = _decimals(list(found.values()))
    rows = []
    for name in study.variants:
        runs = study.of(name)
        is_baseline = name == sweep.get("baseline")
        verdict, *statistics = _statistics(
            found.get(name, {}), runs, decimals, is_baseline=is_baseline
        )
        cells = [
            Cell(name, value=name, kind="name"),
            replace(verdict, under=verdict_notes(study, name)),
            *statistics,
            *_facts(facts.get(name, {})),
            *_measured(runs),
        ]
        rows.append(cells)
    return Table(COLUMNS, rows, cut=1 + sum(column.group == "result" for column in COLUMNS))


def _decimals(rows: list[dict[str, Any]]) -> int:
    """The decimals that show two digits of the smallest half of an interval, at most 6; 4 without intervals."""
    halves = []
    for row in rows:
        if finite_number(row.get("low")) is not None:
            half = (row["high"] - row["low"]) / 2
            if half > 0:
                halves.append(half)
    if not halves:
        return 4
    return max(0, min(6, 1 - math.floor(math.log10(min(halves)))))


def _statistics(
    row: dict[str, Any], runs: list[Run], decimals: int, *, is_baseline: bool
) -> list[Cell]:
    """The cells of the group `result`: verdict, seeds, mean, difference, effect size, Holm's p."""
    count = row.get("n") or 0
    average = finite_number(row.get("mean"))
    mean_cell = Cell(number(average, decimals), _from_to(row, decimals), average)
    if is_baseline:
        verdict_cell = Cell("baseline", value="baseline", kind="verdict")
        return [verdict_cell, _seeds(count, runs), mean_cell, *[Cell(NONE, value=None)] * 3]
    difference = row.get("difference") or {}
    value = finite_number(difference.get("mean"))
    effect = finite_number(difference.get("effect_size"))
    p = finite_number(difference.get("p_holm"))
    return [
        _verdict(difference, count),
        _seeds(count, runs),
        mean_cell,
        Cell(signed(value, decimals), _from_to(difference, decimals, signed), value),
        Cell(signed(effect, 2), value=effect),
        Cell(p_value(p), value=p),
    ]


def _seeds(count: int, runs: list[Run]) -> Cell:
    """How many of the runs count, and how many failed."""
    failed = sum(run.state == "failed" for run in runs)
    under = ""
    if failed:
        under = f"{failed} failed"
    return Cell(f"{count} of {len(runs)}", under, count)


def _verdict(difference: dict[str, Any], count: int) -> Cell:
    """The verdict on a variant with `count` values, or why there is none."""
    verdict = difference.get("verdict")
    if not verdict and count:
        verdict = "too few seeds"
    elif not verdict:
        verdict = "no result yet"
    strong = ""
    if verdict in ("better", "worse"):
        strong = verdict
    return Cell(str(verdict), value=str(verdict), kind=f"verdict {strong}")


def _from_to(
    interval: dict[str, Any], decimals: int, write: Callable[[float | None, int], str] = number
) -> str:
    """The limits of an interval; "" if it has none."""
    low = finite_number(interval.get("low"))
    high = finite_number(interval.get("high"))
    if low is None or high is None:
        return ""
    return f"{write(low, decimals)} to {write(high, decimals)}"


def p_value(p: float | None) -> str:
    """A p value with two digits; a dash for None."""
    if p is None:
        return NONE
    elif p < 1e-4:
        return "< 0.0001"
    elif p < 0.1:
        return f"{p:.2g}"
    return f"{p:.2f}"


def _facts(fact: dict[str, Any]) -> list[Cell]:
    """The cells of the groups `model` and `routing`, from a variant's entry in `sweep.json`."""
    cache_bytes = finite_number(fact.get("kv_bytes_per_token"))
    return [
        _size(fact, "params_total", "KMBT"),
        _size(fact, "params_active", "KMBT"),
        _size(fact, "flops_per_token", "KMGT"),
        Cell(number(cache_bytes, 0), value=cache_bytes),
        _capacity(fact),
        _promise(fact, "drops"),
        _promise(fact, "causal"),
    ]


def _size(fact: dict[str, Any], key: str, units: str) -> Cell:
    value = finite_number(fact.get(key))
    if value is None:
        return Cell(NONE)
    return Cell(short(value, units), value=value)


def _capacity(fact: dict[str, Any]) -> Cell:
    capacity = finite_number(fact.get("capacity_factor"))
    if capacity is not None:
        return Cell(f"{capacity:g}", value=capacity)
    if fact:
        return Cell("none")
    return Cell(NONE)


def _promise(fact: dict[str, Any], key: str) -> Cell:
    text = yes_no(fact.get(key))
    return Cell(text, value=text, kind="word")


def _measured(runs: list[Run]) -> list[Cell]:
    """The cells of the group `measured`: means of the runs' summaries."""
    speeds = _values(runs, "tokens_per_second")
    spread = ""
    if len(speeds) > 1:
        spread = f"{number(min(speeds), 0)} to {number(max(speeds), 0)}"
    return [
        _average(_values(runs, "max_vio_global"), 3),
        _average(_values(runs, "dropped_fraction"), 4),
        replace(_average(speeds, 0), under=spread),
    ]


def _values(runs: list[Run], key: str) -> list[float]:
    """The finite numbers that the summaries have under a key."""
    found = []
    for run in runs:
        value = run.number(key)
        if value is not None:
            found.append(value)
    return found


def _average(values: list[float], decimals: int) -> Cell:
    """The mean of the values; a dash without any."""
    if not values:
        return Cell(NONE)
    return Cell(number(mean(values), decimals), value=mean(values))


def every_run(study: Study, metric_words: str) -> Table:
    """A row for each run: its state, and the reason if it failed."""
    titles = ["variant", "seed", "state", metric_words, "time", "folder"]
    some_failed = any(run.reason for run in study.runs)
    if some_failed:
        titles.append("why it failed")
    rows = []
    for run in study.runs:
        value = run.number(study.metric)
        folder = run.path.relative_to(study.path)
        cells = [
            Cell(run.variant, value=run.variant, kind="name"),
            Cell(str(run.seed), value=finite_number(run.seed)),
            Cell(run.state, value=run.state, kind="word"),
            Cell(number(value, 5), value=value),
            Cell(duration(run.seconds), value=run.seconds),
            Cell(str(folder), value=str(run.path), kind="text"),
        ]
        if some_failed:
            cells.append(Cell(run.reason or "", value=run.reason, kind="text"))
        rows.append(cells)
    return Table([Column(title, "", "") for title in titles], rows)


def recipes(study: Study) -> list[dict[str, Any]]:
    """The recipe of each variant, its overrides, and the keys in which it differs from the baseline's."""
    found = []
    for variant in (study.sweep or {}).get("variants") or []:
        differences = []
        for key, (base, own) in (variant.get("differences") or {}).items():
            differences.append((key, _shown(base), _shown(own)))
        entry = {
            "name": variant["name"],
            "recipe": variant.get("recipe"),
            "overrides": [str(override) for override in variant.get("overrides") or []],
            "differences": differences,
        }
        found.append(entry)
    return found


def _shown(value: Any) -> str:
    """A value of a recipe; a dash where the recipe has no such key."""
    if value is None:
        return NONE
    elif isinstance(value, str):
        return value
    return json.dumps(value)


def key_numbers(run: Run) -> list[tuple[str, str]]:
    """The keys of a run's summary with their values, without the notices, which are among the warnings."""
    numbers = []
    for key, value in run.summary.items():
        if isinstance(value, dict):
            numbers.append((key, _counted_values(value)))
        elif key != "notices":
            numbers.append((key, _plain(value)))
    return numbers


def _counted_values(section: dict[str, Any]) -> str:
    """The different values of a section, with the number of its keys where there are several."""
    counts = Counter(_plain(value) for value in section.values())
    return "; ".join(f"{value} ({count})" for value, count in counts.most_common())


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    known = finite_number(value)
    if known is not None:
        return number(known)
    elif value is None:
        return NONE
    return str(value)
