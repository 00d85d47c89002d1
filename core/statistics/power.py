"""The smallest difference that a comparison paired by seed can show, before any run.

The difference D of n paired runs is tested by Student's t, two-sided. With the standard deviation s of the paired
differences, t has the noncentral t distribution with n - 1 degrees of freedom and noncentrality sqrt(n) D / s (Cohen,
Statistical Power Analysis, chapter 2). The smallest difference that can be shown is the D at which |t| is beyond its
critical value with probability `POWER`. Holm's correction tests the smallest of m p values at `ALPHA` / m, which is the
level taken here: a difference can be shown even where all others have none.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import erfc, exp, lgamma, log, sqrt

from core.statistics.comparison import ALPHA

POWER = 0.8
"""The probability with which a difference of the smallest size is shown."""


def detection_probability(effect: float, n: float, comparisons: int = 1) -> float:
    """The probability with which a difference of a size is shown.

    T = (Z + sqrt(n) effect) / R with a normal Z and R = sqrt(V / f), where V has the chi-square distribution with
    f = n - 1 degrees of freedom. The probability that |T| is beyond the critical value is integrated over R: scipy's
    noncentral t is not a number far in its tails.

    Args:
        effect: the mean difference over the standard deviation of the differences (d_z).
        n: paired runs, at least 2.
        comparisons: how many variants are compared with the baseline.
    """
    from scipy import integrate, stats

    freedom = n - 1
    critical = float(stats.t.isf(ALPHA / comparisons / 2, freedom))
    shift = sqrt(n) * abs(effect)
    scale = log(2) + freedom / 2 * log(freedom / 2) - lgamma(freedom / 2)

    def shown(root: float) -> float:
        """The density of R, times the probability that |T| is beyond the critical value there."""
        if root <= 0:
            return 0.0
        density = exp(scale + (freedom - 1) * log(root) - freedom * root * root / 2)
        return density * (_above(critical * root - shift) + _above(critical * root + shift))

    edge = shift / critical  # there the probability falls from 1 to 0, within a few 1 / critical
    largest = 1 + 40 / sqrt(freedom)
    places = [0.0, 1.0, edge - 4 / critical, edge, edge + 4 / critical, largest]
    inside = sorted({place for place in places if 0 <= place <= largest})
    total = 0.0
    for low, high in pairwise(inside):
        total += float(integrate.quad(shown, low, high, epsabs=1e-10)[0])
    return min(1.0, total)


def _above(value: float) -> float:
    """The probability that a standard normal variable is above a value."""
    return 0.5 * erfc(value / sqrt(2))


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
