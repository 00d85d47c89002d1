"""The interval of a median, without an assumption about how the values are distributed."""

from collections.abc import Sequence
from math import comb
from statistics import median

LEVEL = 0.95
"""The confidence level of the interval."""

FEWEST = 6
"""Values below which not even the smallest and the largest enclose the median so surely."""


def median_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of the median by order statistics (Conover, Practical Nonparametric Statistics, section 3.2).

    Each value is below the true median with probability 1/2, so that the number of values below it is binomial. The
    interval goes from the k-th smallest to the k-th largest value, with the largest k that keeps the level.

    Args:
        values: independent measurements.
        level: the least probability with which such an interval encloses the median.

    Returns:
        The two ends; None where there are too few values for the level.
    """
    ordered = sorted(values)
    n = len(ordered)
    allowed = (1 - level) / 2 * 2**n
    below = 0
    rank = 0
    while rank < n // 2 and below + comb(n, rank) <= allowed:
        below += comb(n, rank)
        rank += 1
    if rank == 0:
        return None
    return ordered[rank - 1], ordered[n - rank]


def half_width(values: Sequence[float]) -> float:
    """Half of the interval as a fraction of the median; infinity where there is no interval."""
    found = median_interval(values)
    if found is None:
        return float("inf")
    low, high = found
    return (high - low) / 2 / median(values)
