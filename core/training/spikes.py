"""Skipping steps whose gradient norm is far above those of the steps before.

Single windows can have gradients many times larger than usual (spikes). Training can skip such steps; OLMo-core's
`SkipStepOptimizer`, for example, skips steps whose loss or gradient norm is six standard deviations from a rolling
mean. Here the norm is compared with a multiple of the median (or mean) of the last applied steps, and the history holds
applied steps alone, so a spike does not raise the bound for the next one.
"""

import hashlib
from collections import deque
from collections.abc import Collection, Mapping
from statistics import fmean, median
from typing import Any

from torch import Tensor

from core.recipe.recipe_schema import SpikeSection
from core.training.ranks import all_reduce_max


class SpikeGuard:
    """The gradient norms of the last applied steps, and whether another norm is a spike beside them.

    Args:
        settings: the recipe's `skip_spikes`.
    """

    def __init__(self, settings: SpikeSection) -> None:
        self.settings = settings
        self.norms: deque[float] = deque(maxlen=settings.window)
        self._learning = ""

    def skips(self, norm: Tensor, learning: Collection[str] | None) -> bool:
        """Whether a step with this norm is skipped; if not, the norm is one of the history. Every rank calls this.

        Ranks may round their norms differently, so all of them take the largest.

        Args:
            norm: the global gradient norm, finite.
            learning: names of the weights that the step updates; None: all.
        """
        self.begin_step(learning)
        largest = float(all_reduce_max(norm))
        if self.is_spike(largest):
            return True
        self.applied(largest)
        return False

    def begin_step(self, learning: Collection[str] | None) -> None:
        """Forgets the history where other weights are updated than in the step before: their norms do not compare.

        Args:
            learning: names of the weights that the step updates; None: all.
        """
        now = ""
        if learning is not None:
            now = hashlib.sha256("\n".join(sorted(learning)).encode()).hexdigest()
        if now != self._learning:
            self.norms.clear()
        self._learning = now

    @property
    def bound(self) -> float | None:
        """The largest norm that is no spike; None until the history is full, or while it is all zeros."""
        if len(self.norms) < self.settings.window:
            return None
        middle = median(self.norms) if self.settings.statistic == "median" else fmean(self.norms)
        return self.settings.factor * middle if middle > 0 else None

    def is_spike(self, norm: float) -> bool:
        """Whether a step with this norm is to be skipped."""
        bound = self.bound
        return bound is not None and norm > bound

    def applied(self, norm: float) -> None:
        """Adds the norm of a step that was applied."""
        self.norms.append(norm)

    def failure(self, norm: float, *, in_a_row: int, step: int) -> str:
        """The error message of a run in which too many steps in a row were skipped; the last one was a spike."""
        bound = f"{self.bound:.4g}" if self.bound else "nothing"
        return (
            f"the gradient norm was {norm:.4g}, and skip_spikes allows {bound}; {in_a_row} steps in a row were "
            f"skipped, the last one step {step}, and the run stops with its last checkpoint as it is: the norm "
            "has risen for good, so try a larger skip_spikes.factor or a lower optimizer.lr"
        )

    def state(self) -> dict[str, Any]:
        """The history, in plain containers."""
        return {"norms": list(self.norms), "learning": self._learning}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues the history of a checkpoint."""
        self.norms = deque(state["norms"], maxlen=self.settings.window)
        self._learning = state["learning"]
