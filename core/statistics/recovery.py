"""How many steps a run needs until its load is balanced again after its data have shifted.

The level before the shift is the mean of the per-step MaxVio over the last quarter of the steps before it. After the
shift the mean over every window of `WINDOW` consecutive steps is taken. The load is balanced again with the first
window whose mean is at most (1 + `MARGIN`) times that level; the steps until then are those between the shift and the
window's first step. 0 means that the first window is balanced already: what left the level left it for few steps or by
little. A later window may be out of balance again, which `peak` shows. A run that ends before a balanced window is
right-censored: all that is known is that it needs at least as many steps as it has windows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

WINDOW = 20
"""Steps whose mean counts: a single step's load is noisy."""

MARGIN = 0.5
"""How far above its level before the shift the load may lie and count as balanced, as a fraction of that level."""

LEVEL = 0.25
"""The part of the steps before the shift, up to it, over which the level before is taken."""


@dataclass(frozen=True)
class Recovery:
    """What a shift of the data did to the balance of the load.

    Args:
        before: mean MaxVio over the last quarter of the steps before the shift.
        peak: the largest mean over a window of `WINDOW` steps after it.
        steps: steps between the shift and the first balanced window; the number of windows if there is none.
        balanced: whether there was one; if not, `steps` is a lower bound.
    """

    before: float
    peak: float
    steps: int
    balanced: bool


def recovery(violations: Mapping[int, float], shift: int, last: int) -> Recovery | None:
    """The recovery of a run from a shift of its data.

    Args:
        violations: MaxVio by step, counted from 1.
        shift: the number of steps before the shift.
        last: the last step of the run.

    Returns:
        None where a step that counts has no value, or fewer than `WINDOW` steps come after the shift.
    """
    first = shift - max(1, round(LEVEL * shift)) + 1
    steps_before = range(first, shift + 1)
    steps_after = range(shift + 1, last + 1)
    is_complete = all(step in violations for step in (*steps_before, *steps_after))
    if not is_complete or len(steps_after) < WINDOW:
        return None
    before = sum(violations[step] for step in steps_before) / len(steps_before)
    after = [violations[step] for step in steps_after]
    means: list[float] = []
    for begin in range(len(after) - WINDOW + 1):
        means.append(sum(after[begin : begin + WINDOW]) / WINDOW)
    for steps, mean in enumerate(means):
        if mean <= (1 + MARGIN) * before:
            return Recovery(before, max(means), steps, balanced=True)
    return Recovery(before, max(means), len(means), balanced=False)
