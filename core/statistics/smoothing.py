"""The relative difference of two smoothed training curves, the measure of DeepSeek-V3's report.

The report (section 3.3, appendix B.1) compares FP8 with BF16 training by the relative error of losses smoothed by an
exponential moving average with decay 0.9. Runs of one seed read the same tokens, so what is left is the method, and
how far rounding alone drives two runs apart.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

DECAY = 0.9
"""The decay of the moving average."""

SETTLED = 0.1
"""The part of the steps, from the beginning, that the largest difference leaves out."""


def smoothed(losses: Sequence[float], decay: float = DECAY) -> list[float]:
    """The exponential moving average of the losses, which starts at the first one."""
    return list(accumulate(losses, lambda before, loss: decay * before + (1 - decay) * loss))


def relative(mine: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """The relative difference of the smoothed losses, at every step that both curves have.

    Args:
        mine, base: training loss by step.
    """
    steps = sorted(mine.keys() & base.keys())
    own_curve = smoothed([mine[step] for step in steps])
    base_curve = smoothed([base[step] for step in steps])
    return [(own - other) / other for own, other in zip(own_curve, base_curve, strict=True)]


def largest(differences: Sequence[float]) -> float:
    """The largest absolute difference after the first tenth of the steps."""
    first = int(SETTLED * len(differences))
    return max(abs(value) for value in differences[first:])
