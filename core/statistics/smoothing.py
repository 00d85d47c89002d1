"""How far one training curve lies from another, as DeepSeek-V3's report says it: relative, of smoothed losses.

The report (section 3.3, appendix B.1) compares FP8 with BF16 training by the relative error of losses smoothed by an
exponential moving average with decay 0.9. Runs of one seed read the same tokens, so what is left is the method, and
how far rounding alone drives two runs apart.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

DECAY = 0.9
"""Of the moving average."""

SETTLED = 0.1
"""Of the steps: the beginning that the largest difference leaves out."""


def smoothed(losses: Sequence[float], decay: float = DECAY) -> list[float]:
    """The exponential moving average, which starts at the first loss."""
    return list(accumulate(losses, lambda before, loss: decay * before + (1 - decay) * loss))


def relative(mine: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """The relative difference of the smoothed losses, at every step that both curves have.

    Args:
        mine, base: training loss by step.
    """
    steps = sorted(mine.keys() & base.keys())
    pairs = zip(smoothed([mine[s] for s in steps]), smoothed([base[s] for s in steps]), strict=True)
    return [(one - other) / other for one, other in pairs]


def largest(differences: Sequence[float]) -> float:
    """The largest size, after the first tenth."""
    return max(abs(value) for value in differences[int(SETTLED * len(differences)) :])
