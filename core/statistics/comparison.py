"""Statistics of a few runs: intervals, differences paired by seed, and a correction for several comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.95
"""The confidence level of every interval."""

ALPHA = 0.05
"""The significance level: a corrected p must be below it."""

ROUNDING = 1e-12
"""Differences that spread less than this, as a fraction of the values, are equal."""

NOTHING_SHOWN = "no difference shown"
"""The verdict where the interval contains 0."""

NOT_AFTER_HOLM = "not shown after Holm's correction"
"""The verdict where the interval excludes 0, but among so many variants one interval would by chance."""

CENSORED = "not comparable: a run ended before its load was balanced"
"""The verdict where a value is only a lower bound."""


@dataclass(frozen=True)
class Interval:
    """The mean of n values with its interval by Student's t; without an interval below two values."""

    n: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """One variant against the baseline over the seeds that both have.

    Args:
        interval: that of the mean difference, variant minus baseline.
        effect_size: the mean difference over the standard deviation of the differences (Cohen's d_z); None if they
            do not spread.
        p: two-sided, of a paired t test; None below two seeds. Differences that do not spread are its limit: 0, or 1
            if they are 0 themselves.
    """

    interval: Interval
    effect_size: float | None
    p: float | None


def interval(values: Sequence[float]) -> Interval:
    """The mean and its interval by Student's t: mean ± t(LEVEL, n - 1) x deviation / sqrt(n)."""
    from scipy import stats

    n = len(values)
    mean = sum(values) / n
    spread = deviation(values)
    if spread is None:
        return Interval(n, mean, None, None)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * spread / n**0.5
    return Interval(n, mean, mean - half, mean + half)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, None below two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    squares = sum((value - mean) ** 2 for value in values)
    return float((squares / (n - 1)) ** 0.5)


def paired(baseline: Mapping[int, float], variant: Mapping[int, float]) -> Difference | None:
    """A paired t test of the differences at the seeds that both have; None if they have none in common.

    Args:
        baseline, variant: a metric by seed.
    """
    from scipy import stats

    seeds = sorted(baseline.keys() & variant.keys())
    if not seeds:
        return None
    n = len(seeds)
    differences = [variant[seed] - baseline[seed] for seed in seeds]
    found = interval(differences)
    mean = found.mean
    spread = deviation(differences)
    if spread is None:
        return Difference(found, None, None)
    scale = max(max(abs(baseline[seed]), abs(variant[seed])) for seed in seeds)
    if spread <= ROUNDING * scale:  # equal differences: there is nothing to divide by
        p = 1.0 if abs(mean) <= ROUNDING * scale else 0.0
        return Difference(found, None, p)
    t = mean / (spread / n**0.5)
    p = float(2 * stats.t.sf(abs(t), n - 1))
    return Difference(found, mean / spread, p)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """The p values after Holm's step-down correction; a None stays None and is not counted."""
    known = [(value, index) for index, value in enumerate(p) if value is not None]
    order = [index for _, index in sorted(known)]
    corrected: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, index in enumerate(order):
        value = p[index]
        assert value is not None
        highest = max(highest, min(1.0, (len(order) - rank) * value))
        corrected[index] = highest
    return corrected


def verdict(difference: Difference, p_holm: float | None, better: str) -> str | None:
    """`better`, `worse`, `NOTHING_SHOWN` or `NOT_AFTER_HOLM`; None below two seeds.

    A difference is shown if its interval excludes 0 and its corrected p is below ALPHA.

    Args:
        difference: the variant's, to the baseline.
        p_holm: its p after Holm's correction.
        better: "lower" or "higher" values of the metric.
    """
    low = difference.interval.low
    high = difference.interval.high
    if low is None or high is None:
        return None
    equal_runs = difference.p == 1  # their interval holds nothing but rounding
    if low <= 0 <= high or equal_runs:
        return NOTHING_SHOWN
    if p_holm is None or p_holm >= ALPHA:
        return NOT_AFTER_HOLM
    if (difference.interval.mean < 0) == (better == "lower"):
        return "better"
    return "worse"


def compare(
    values: Mapping[str, Mapping[int, float]], baseline: str, better: str
) -> dict[str, dict[str, Any] | None]:
    """The differences of all variants to the baseline, as plain containers.

    Args:
        values: the metric by variant and seed, of the runs that have one.
        baseline: the variant that all others are compared with.
        better: "lower" or "higher".

    Returns:
        A row by variant; None for the baseline, and if no seed is common.
    """
    base = values.get(baseline, {})
    found: dict[str, Difference] = {}
    for name, own in values.items():
        difference = paired(base, own)
        if name != baseline and difference is not None:
            found[name] = difference
    corrected = holm([difference.p for difference in found.values()])
    rows: dict[str, dict[str, Any] | None] = dict.fromkeys(values)
    for (name, difference), p_holm in zip(found.items(), corrected, strict=True):
        rows[name] = {
            **asdict(difference.interval),
            "effect_size": difference.effect_size,
            "p": difference.p,
            "p_holm": p_holm,
            "verdict": verdict(difference, p_holm, better),
        }
    return rows
