"""The smallest difference that a comparison paired by seed can show, before any run.

The difference D of n paired runs is tested by Student's t, two-sided. With the standard deviation s of the paired
differences, t has the noncentral t distribution with n - 1 degrees of freedom and noncentrality sqrt(n) D / s (Cohen,
Statistical Power Analysis, chapter 2). The smallest difference that can be shown is the D at which |t| is beyond its
critical value with probability `POWER`. Holm's correction tests the smallest of m p values at `ALPHA` / m, which is the
level taken here: a difference can be shown even where all others have none.
"""

from collections.abc import Sequence
from math import sqrt

from core.statistics.comparison import ALPHA

POWER = 0.8
"""The probability with which a difference of the smallest size is shown."""


def detection_probability(effect: float, n: float, comparisons: int = 1) -> float:
    """The probability with which a difference of a size is shown.

    Args:
        effect: the mean difference over the standard deviation of the differences (d_z).
        n: paired runs, at least 2.
        comparisons: how many variants are compared with the baseline.
    """
    from scipy import stats

    freedom = n - 1
    critical = float(stats.t.isf(ALPHA / comparisons / 2, freedom))
    noncentrality = sqrt(n) * abs(effect)
    above = float(stats.nct.sf(critical, freedom, noncentrality))
    below = float(stats.nct.cdf(-critical, freedom, noncentrality))
    return above + below


def smallest_effect(n: float, comparisons: int = 1) -> float | None:
    """The smallest d_z that is shown with probability `POWER`; None for fewer than two paired runs.

    Args:
        n: paired runs.
        comparisons: how many variants are compared with the baseline.
    """
    from scipy import optimize

    if n < 2 or comparisons < 1:
        return None

    def missing(effect: float) -> float:
        return detection_probability(effect, n, comparisons) - POWER

    high = 1.0
    while missing(high) < 0:
        high *= 2
    return float(optimize.brentq(missing, 0.0, high, xtol=1e-9))


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation that several groups of differences share, each around its own mean.

    sqrt(sum of squares / sum of (n - 1)) over the groups of at least two values; None without one.
    """
    squares = 0.0
    freedom = 0
    for values in groups:
        if len(values) < 2:
            continue
        mean = sum(values) / len(values)
        squares += sum((value - mean) ** 2 for value in values)
        freedom += len(values) - 1
    if not freedom:
        return None
    return sqrt(squares / freedom)
