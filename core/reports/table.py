"""The tables: results, every run, what differs between the recipes, key numbers of one run."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from core.analysis.compare import short
from core.reports.folder import Run, Study, finite
from core.reports.words import NONE, caveats, duration, number, signed, yes_no


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what is shown.
        under: a second, smaller line.
        value: what it is sorted by; None goes last.
        kind: a class of the style sheet.
    """

    text: str
    under: str = ""
    value: float | str | None = None
    kind: str = "number"


@dataclass(frozen=True)
class Column:
    """One column: its heading, the group that it stands in, and what it means."""

    title: str
    group: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells.

    Args:
        cut: after how many columns it is cut in two for paper, on which nothing scrolls; the first column stands in
            both. A group is never cut.
    """

    columns: list[Column]
    rows: list[list[Cell]]
    cut: int | None = None

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Neighbouring columns of one group: its name and how many they are."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found


COLUMNS = [
    Column("variant", "", "the first column; sort by any heading"),
    Column("verdict", "result", "better or worse only where the interval leaves out 0 and Holm's p is below 0.05"),
    Column("seeds", "result", "finished runs with a value"),
    Column("mean", "result", "mean over seeds, with its 95% interval by Student's t"),
    Column("difference", "result", "to the baseline, mean of the seeds' differences, with its 95% interval"),
    Column("effect size", "result", "mean difference / standard deviation of the differences (Cohen's d_z)"),
    Column("Holm p", "result", "p of a paired t test, corrected for the number of variants"),
    Column("params", "model", "of the main model"),
    Column("active", "model", "parameters used by one token"),
    Column("FLOPs/token", "model", "training, forward and backward"),
    Column("KV bytes", "model", "of cache per token"),
    Column("capacity", "routing", "what an expert takes at most, over its even share"),
    Column("drops", "routing", "whether assignments may be left undone in training"),
    Column("causal", "routing", "no output depends on a later token"),
    Column("MaxVio", "measured", "over the held-out split, mean over seeds"),
    Column("dropped", "measured", "fraction of assignments not carried out, mean over seeds"),
    Column("tokens/s", "measured", "mean over seeds, from the slowest to the fastest run"),
]


def results(study: Study) -> Table:
    """A row for each variant."""
    found = {str(row.get("variant")): row for row in study.results.get("rows") or []}
    facts = {str(v["name"]): v for v in (study.sweep or {}).get("variants") or []}
    decimals = _decimals(list(found.values()))
    baseline = (study.sweep or {}).get("baseline")
    rows = []
    for name in study.variants:
        row, fact, runs = found.get(name, {}), facts.get(name, {}), study.of(name)
        statistics = _statistics(row, runs, decimals, is_baseline=name == baseline)
        statistics[0] = replace(statistics[0], under=caveats(study, name))
        rows.append([Cell(name, value=name, kind="name"), *statistics, *_facts(fact), *_measured(runs)])
    return Table(COLUMNS, rows, cut=1 + sum(column.group == "result" for column in COLUMNS))


def _decimals(rows: list[dict[str, Any]]) -> int:
    """As many as show two digits of the smallest half of an interval; four without intervals."""
    halves = [(row["high"] - row["low"]) / 2 for row in rows if finite(row.get("low")) is not None]
    smallest = min((half for half in halves if half > 0), default=None)
    return 4 if smallest is None else max(0, min(6, 1 - math.floor(math.log10(smallest))))


def _statistics(row: dict[str, Any], runs: list[Run], decimals: int, *, is_baseline: bool) -> list[Cell]:
    average, count = finite(row.get("mean")), row.get("n") or 0
    gone = sum(run.state == "failed" for run in runs)
    failed = f"{gone} failed" if gone else ""
    seeds = Cell(f"{count} of {len(runs)}", failed, count)
    mean_cell = Cell(number(average, decimals), _from_to(row, decimals), average)
    if is_baseline:
        blank = [Cell(NONE, value=None)] * 3
        return [Cell("baseline", value="baseline", kind="verdict"), seeds, mean_cell, *blank]
    difference = row.get("difference") or {}
    value, effect, p = (finite(difference.get(key)) for key in ("mean", "effect_size", "p_holm"))
    verdict = str(difference.get("verdict") or ("too few seeds" if count else "no result yet"))
    strong = verdict if verdict in ("better", "worse") else ""
    return [
        *(Cell(verdict, value=verdict, kind=f"verdict {strong}"), seeds, mean_cell),
        Cell(signed(value, decimals), _from_to(difference, decimals, signed), value),
        *(Cell(signed(effect, 2), value=effect), Cell(_p(p), value=p)),
    ]


def _from_to(of: dict[str, Any], decimals: int, write: Callable[[float | None, int], str] = number) -> str:
    low, high = finite(of.get("low")), finite(of.get("high"))
    return "" if low is None or high is None else f"{write(low, decimals)} to {write(high, decimals)}"


def _p(p: float | None) -> str:
    return NONE if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _facts(fact: dict[str, Any]) -> list[Cell]:
    def size(key: str, units: str) -> Cell:
        value = finite(fact.get(key))
        return Cell(NONE if value is None else short(value, units), value=value)

    kept, capacity = finite(fact.get("kv_bytes_per_token")), finite(fact.get("capacity_factor"))
    limit = Cell("none" if fact else NONE) if capacity is None else Cell(f"{capacity:g}", value=capacity)
    promises = [Cell(yes_no(fact.get(key)), value=yes_no(fact.get(key)), kind="word") for key in ("drops", "causal")]
    sizes = [size("params_total", "KMBT"), size("params_active", "KMBT"), size("flops_per_token", "KMGT")]
    return [*sizes, Cell(number(kept, 0), value=kept), limit, *promises]


def _measured(runs: list[Run]) -> list[Cell]:
    def average(key: str, decimals: int, fallback: str = "") -> Cell:
        values = [v for run in runs if (v := run.number(key)) is not None]
        value = mean(values) if values else None
        return Cell(number(value, decimals), value=value)

    speeds = [v for run in runs if (v := run.number("tokens_per_second")) is not None]
    spread = f"{number(min(speeds), 0)} to {number(max(speeds), 0)}" if len(speeds) > 1 else ""
    speed = Cell(number(mean(speeds), 0), spread, mean(speeds)) if speeds else Cell(NONE)
    return [average("max_vio_global", 3), average("dropped_fraction", 4), speed]


def every_run(study: Study, metric_words: str) -> Table:
    """A row for each run: its state, and the reason where it failed."""
    titles = ["variant", "seed", "state", metric_words, "time", "folder"]
    some_failed = any(run.reason for run in study.runs)
    columns = [Column(title, "", "") for title in titles + ["why it failed"] * some_failed]
    rows = []
    for run in study.runs:
        value = run.number(study.metric)
        rows.append(
            [
                *(Cell(run.variant, value=run.variant, kind="name"), Cell(str(run.seed), value=finite(run.seed))),
                *(Cell(run.state, value=run.state, kind="word"), Cell(number(value, 5), value=value)),
                Cell(duration(run.seconds), value=run.seconds),
                Cell(str(run.path.relative_to(study.path)), value=str(run.path), kind="text"),
                *[Cell(run.reason or "", value=run.reason, kind="text")] * some_failed,
            ]
        )
    return Table(columns, rows)


def recipes(study: Study) -> list[dict[str, Any]]:
    """For each variant: its recipe, its overrides, and the keys in which it is not the baseline."""
    found = []
    for variant in (study.sweep or {}).get("variants") or []:
        differences = variant.get("differences") or {}
        pairs = [(key, *(_shown(v) for v in pair)) for key, pair in differences.items()]
        overrides = [str(o) for o in variant.get("overrides") or []]
        found.append(
            {"name": variant["name"], "recipe": variant.get("recipe"), "overrides": overrides, "differences": pairs}
        )
    return found


def _shown(value: Any) -> str:
    return NONE if value is None else value if isinstance(value, str) else json.dumps(value)


def key_numbers(run: Run) -> list[tuple[str, str]]:
    """What one run measured, as its summary names it."""
    hidden = ("notices",)
    return [(key, _plain(value)) for key, value in run.summary.items() if key not in hidden]


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    known = finite(value)
    return number(known) if known is not None else NONE if value is None else str(value)
