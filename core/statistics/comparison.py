"""What a handful of runs can tell: intervals, differences paired by seed, and a correction for asking many times."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.95
"""Of every interval."""

ALPHA = 0.05
"""What a corrected p must stay below."""

ROUNDING = 1e-12
"""Differences that spread less than this, as a fraction of the values, are equal."""

NOTHING_SHOWN = "no difference shown"
"""Where the interval holds 0."""

NOT_AFTER_HOLM = "not shown after Holm's correction"
"""Where the interval leaves out 0, and so many variants were asked that one would by chance."""


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
        interval: of the mean difference, variant minus baseline.
        effect_size: the mean difference over the standard deviation of the differences (Cohen's d_z); None where they
            do not spread.
        p: two-sided, of a paired t test; None below two seeds. Differences that do not spread are its limit: 0, or 1
            where they are 0 themselves.
    """

    interval: Interval
    effect_size: float | None
    p: float | None


def interval(values: Sequence[float]) -> Interval:
    """The mean and its interval."""
    from scipy import stats

    n, mean = len(values), sum(values) / len(values)
    spread = deviation(values)
    if spread is None:
        return Interval(n, mean, None, None)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * spread / n**0.5
    return Interval(n, mean, mean - half, mean + half)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, None below two values."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return float((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5)


def paired(baseline: Mapping[int, float], variant: Mapping[int, float]) -> Difference | None:
    """The differences of the seeds that both have; None where they have none in common."""
    from scipy import stats

    seeds = sorted(baseline.keys() & variant.keys())
    if not seeds:
        return None
    differences = [variant[seed] - baseline[seed] for seed in seeds]
    spread = deviation(differences)
    scale = max(abs(value) for seed in seeds for value in (baseline[seed], variant[seed]))
    mean = sum(differences) / len(differences)
    if spread is None:
        return Difference(interval(differences), None, None)
    if spread <= ROUNDING * scale:  # equal differences: there is nothing to divide by
        return Difference(interval(differences), None, 1.0 if abs(mean) <= ROUNDING * scale else 0.0)
    t = mean / (spread / len(differences) ** 0.5)
    return Difference(interval(differences), mean / spread, float(2 * stats.t.sf(abs(t), len(differences) - 1)))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; what has no p has none afterwards, and is not counted."""
    order = sorted((index for index, value in enumerate(p) if value is not None), key=lambda index: p[index])  # type: ignore[arg-type,return-value]
    corrected: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, index in enumerate(order):
        value = p[index]
        assert value is not None
        highest = max(highest, min(1.0, (len(order) - rank) * value))
        corrected[index] = highest
    return corrected


def verdict(difference: Difference, p_holm: float | None, better: str) -> str | None:
    """`better`, `worse`, or that nothing is shown, alone or after Holm; None where there are too few seeds to say.

    A difference is shown where its interval leaves out 0 and its corrected p is below ALPHA.

    Args:
        better: "lower" or "higher" values of the metric.
    """
    low, high = difference.interval.low, difference.interval.high
    if low is None or high is None:
        return None
    if low <= 0 <= high or difference.p == 1:  # equal runs: what is left of their interval is rounding
        return NOTHING_SHOWN
    if p_holm is None or p_holm >= ALPHA:
        return NOT_AFTER_HOLM
    return "better" if (difference.interval.mean < 0) == (better == "lower") else "worse"


def compare(values: Mapping[str, Mapping[int, float]], baseline: str, better: str) -> dict[str, dict[str, Any] | None]:
    """Every variant against the baseline, as plain containers; None for the baseline, and where no seed is common.

    Args:
        values: the metric by variant and seed, of the runs that have one.
        baseline: the variant that all others are held against.
        better: "lower" or "higher".
    """
    base = values.get(baseline, {})
    found = {name: paired(base, mine) for name, mine in values.items() if name != baseline}
    corrected = dict(zip(found, holm([d.p if d else None for d in found.values()]), strict=True))
    rows: dict[str, dict[str, Any] | None] = dict.fromkeys(values)
    for name, difference in found.items():
        if difference is not None:
            p_holm = corrected[name]
            told = {"p": difference.p, "p_holm": p_holm, "verdict": verdict(difference, p_holm, better)}
            rows[name] = {**asdict(difference.interval), "effect_size": difference.effect_size, **told}
    return rows
