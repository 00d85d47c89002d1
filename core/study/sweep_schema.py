"""The keys of a sweep file, and the checks of their values."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Literal

from core.contracts.errors import ConfigError, nearest
from core.contracts.schema import setting

LONGEST = 200
"""Bytes of a variant's name at most: it names a folder and a file, and a file system takes 255 with suffixes."""

_KEY_PATH = re.compile(r"[^\s=.#]+(\.[^\s=.#]+)*")

METRICS = (
    "val_bits_per_byte",
    "val_loss",
    "validation_bytes",
    "mtp_acceptance",
    "max_vio_global",
    "max_vio_batch",
    "dropped_fraction",
    "steps",
    "tokens",
    "skipped_steps",
    "wall_seconds",
    "train_seconds",
    "tokens_per_second",
    "mfu",
    "peak_flops",
    "params_total",
    "params_mtp",
    "params_active",
    "flops_per_token",
    "peak_memory_bytes",
    "threads",
    "steps_until_balanced",
    "max_vio_before_shift",
    "max_vio_peak_after_shift",
)
"""The numbers in summary.json."""


AVERAGED = ("val_loss", "val_bits_per_byte")
"""The numbers in summary.json that averaged weights have too, as `<average>/val_loss`."""


def average_of(metric: str) -> str:
    """The name of the averaged weights that a metric is about (`ema` in `ema/val_loss`); "" for the weights."""
    name, _, value = metric.rpartition("/")
    return name if value in AVERAGED else ""


@dataclass(kw_only=True)
class VariantSection:
    """One variant: a recipe, or the base, with something changed."""

    recipe: str | None = setting(None, doc="a recipe file or shipped name; null: the sweep's base")
    overrides: dict[str, Any] = setting({}, doc="KEY.PATH: VALUE, as on the command line")
    search: dict[str, list[Any]] = setting(
        {}, doc="KEY.PATH: [values, in rising order]; the best combination is run with the seeds"
    )


@dataclass(kw_only=True)
class SearchSection:
    """The first stage of a sweep, in which every variant searches its own values with an equal budget."""

    seeds: list[int] = setting(
        [], doc="one run of every value for each; none of them may be among the sweep's seeds"
    )


@dataclass(kw_only=True)
class SkipSection:
    """A rule that leaves out points of the grid."""

    when: dict[str, Any] = setting(
        doc="KEY.PATH: VALUE, or a list of values; a point that has all of them is left out"
    )
    variants: list[str] = setting([], doc="the variants that the rule is about; empty: all")
    reason: str = setting(doc="why such a point cannot be run, or need not be; it is printed")


@dataclass(kw_only=True)
class MatchSection:
    """What must be equal in all variants, and the variants that are exempt."""

    params: float | None = setting(
        0.02, doc="total parameters, as a fraction of the baseline's; null: not checked"
    )
    flops: float | None = setting(
        0.02, doc="training FLOPs per token, or of a run where budget.flops is given; likewise"
    )
    allow: list[str] = setting(
        [], doc="things that may differ, in the words of describe --compare (attention, steps)"
    )
    exempt: dict[str, str] = setting(
        {}, doc="variants that need not match, each with the reason, which is printed"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a tolerance outside [0, 1)."""
        for key in ("params", "flops"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(key, "must be at least 0 and less than 1, or null")


@dataclass(kw_only=True)
class SweepSchema:
    """A whole sweep file."""

    title: str = setting("", doc="the question that the sweep answers, one sentence")
    base: str = setting(doc="a recipe file or shipped name that variants start from")
    seeds: list[int] = setting(doc="one run of every variant for each")
    variants: dict[str, VariantSection] = setting(doc="what is compared, by name")
    grid: dict[str, list[Any]] = setting(
        {}, doc="KEY.PATH: [values]; every variant with every combination"
    )
    skip: list[SkipSection] = setting([], doc="rules that leave out points of the grid")
    skip_refused: bool = setting(
        False, doc="whether points of the grid are left out whose recipe its own checks refuse"
    )
    baseline: str = setting(doc="the variant that all others are compared with")
    metric: str = setting("val_bits_per_byte", doc="a key of summary.json")
    better: Literal["lower", "higher"] = setting(
        "lower", doc="whether lower or higher values are better"
    )
    search: SearchSection = setting({}, doc="seeds of the search that precedes the comparison")
    expected_sd: float | str | None = setting(
        None,
        doc="standard deviation of the paired differences, or an earlier sweep's folder to take it from",
    )
    budget: dict[str, Any] = setting(
        {}, doc="the recipe's budget for every run; empty: each recipe's own"
    )
    overrides: dict[str, Any] = setting({}, doc="KEY.PATH: VALUE for every run")
    match: MatchSection = setting({}, doc="what must be equal before anything is run")
    smoke: dict[str, Any] = setting(
        {}, doc="keys of this file for --smoke, each in the place of the whole key above"
    )

    def config_errors(self) -> Iterator[ConfigError]:
        """Every error: nothing to run, invalid or unknown names, and keys that two sections would both set."""
        yield from self._run_errors()
        yield from self._name_errors()
        yield from self._override_errors()
        yield from self._search_errors()
        if isinstance(self.expected_sd, float | int) and self.expected_sd <= 0:
            yield ConfigError("expected_sd", "must be above 0, or a sweep's folder")

    def _run_errors(self) -> Iterator[ConfigError]:
        """Errors of seeds, variants and grid."""
        if not self.seeds:
            yield ConfigError("seeds", "must hold at least one seed")
        elif len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            yield ConfigError("seeds", "must be different whole numbers of at least 0")
        if not self.variants:
            yield ConfigError("variants", "must hold at least one variant")
        for name in self.variants:
            if not name or not all(c.isalnum() or c in "_-+=" for c in name):
                allowed = "use letters, digits and _ - + ="
                yield ConfigError("variants", f"{name!r} cannot name a folder: {allowed}")
        for key, values in self.grid.items():
            if not values:
                yield ConfigError("grid", f"{key} must have at least one value")

    def _name_errors(self) -> Iterator[ConfigError]:
        """Errors of the metric's name, and of the keys under `smoke`."""
        if self.metric not in METRICS and not average_of(self.metric):
            yield ConfigError("metric", f"no run logs it; {nearest(self.metric, METRICS)}")
        known = set(self.__dataclass_fields__) - {"smoke"}
        for key in self.smoke:
            if key not in known:
                yield ConfigError("smoke", f"unknown key {key!r}; {nearest(key, known)}")

    def _override_errors(self) -> Iterator[ConfigError]:
        """Errors of overrides that are not key paths, or that `seeds` or `budget` would replace."""
        for key in self.budget:
            if not _KEY_PATH.fullmatch(key):
                yield ConfigError("budget", f"{key!r} is not a key")
        for where, keys in (("overrides", self.overrides), ("grid", self.grid)):
            if why := _wrong_override(keys, self.budget):
                yield ConfigError(where, why)
        for name, section in self.variants.items():
            for keys in (section.overrides, section.search):
                if why := _wrong_override(keys, self.budget):
                    yield ConfigError("variants", f"{name}: {why}")

    def _search_errors(self) -> Iterator[ConfigError]:
        """Errors of the search: its seeds, its values, and budgets that are not equal."""
        searching = [name for name, section in self.variants.items() if section.search]
        seeds = self.search.seeds
        if not searching:
            if seeds:
                yield ConfigError("search", "has seeds, but no variant has a `search`")
            return
        if not seeds:
            yield ConfigError(
                "search", f"seeds must hold at least one seed: {searching[0]} searches"
            )
        elif len(set(seeds)) < len(seeds) or min(seeds) < 0:
            yield ConfigError("search", "seeds must be different whole numbers of at least 0")
        if both := sorted({*seeds} & {*self.seeds}):
            why = f"seeds: {both[0]} is also among the sweep's `seeds`, which must be new to the search"
            yield ConfigError("search", why)
        for name in searching:
            everywhere = dict.fromkeys(self.overrides, "`overrides`")
            everywhere |= dict.fromkeys(self.grid, "`grid`")
            if reason := _wrong_search(self.variants[name], everywhere):
                yield ConfigError("variants", f"{name}: {reason}")
        counts = {name: count_points(section) for name, section in self.variants.items()}
        is_empty = any(counts[name] == 0 for name in searching)  # an error of its own
        if not is_empty and len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            why = f"every variant must search equally many values, and they have: {listed}"
            yield ConfigError("search", why)


def count_points(section: VariantSection) -> int:
    """The number of combinations that a variant searches; 0 if it does not search."""
    if not section.search:
        return 0
    return prod(len(values) for values in section.search.values())


def _wrong_search(section: VariantSection, elsewhere: Mapping[str, str]) -> str | None:
    """The reason why a variant cannot search its values; None if there is none.

    Args:
        section: the variant's.
        elsewhere: keys that the sweep sets for every variant, with the section of the file that sets them.
    """
    taken = {**elsewhere, **dict.fromkeys(section.overrides, "its `overrides`")}
    searched = list(section.search)
    for key, values in section.search.items():
        if not values:
            return f"search.{key} must have at least one value"
        if key in taken:
            return f"search.{key} is also set by `overrides` or `grid`"
        for inner, where in {**taken, **dict.fromkeys(searched, "its `search`")}.items():
            if inner.startswith(f"{key}."):
                why = f"{inner}, a key inside it, is set by {where}"
                return f"search.{key} gives the whole section, and {why}: give one of them"
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            if any(value in values[:index] for index, value in enumerate(values)):
                return f"search.{key} has a value twice"
        elif any(high <= low for low, high in pairwise(values)):
            return f"search.{key} must be numbers that rise"
    return None


def _wrong_override(keys: Iterable[str], budget: Mapping[str, Any]) -> str | None:
    """The reason why one of the overrides is not a key path, or would be silently replaced; None if there is none."""
    for key in keys:
        if not _KEY_PATH.fullmatch(key):
            return f"{key!r} must be a key path such as optimizer.lr"
        if key == "seed":
            return "seed is given by `seeds`"
        if budget and key.partition(".")[0] == "budget":
            return f"{key} is given by `budget`, for every run"
    return None
