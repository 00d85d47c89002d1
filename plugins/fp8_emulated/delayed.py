"""Delayed scaling: scales from the largest values of the steps before (Micikevicius et al., arXiv 2209.05433)."""

import torch
from torch import Tensor

from core.contracts.precision import StepState
from core.numerics.exact import ExactState

OPERANDS = ("activation", "weight", "gradient")


class DelayedAmax(ExactState, StepState):
    """The largest magnitudes of a layer's three operands, over the last steps and in the one under way.

    A product only takes a maximum into the present one, which the products of this step do not read: recomputed,
    accumulated or read twice, a batch leaves the same. At the end of the step the present one becomes the newest
    of the history, and the oldest is forgotten.

    Args:
        history: steps that are remembered.
        experts: weights with a scale of their own; 0 for a plain layer.
    """

    def __init__(self, history: int, experts: int) -> None:
        super().__init__()
        for operand in OPERANDS:
            shape = (experts, 1, 1) if experts and operand == "weight" else (1, 1)
            self.register_buffer(f"{operand}_now", torch.empty(shape), persistent=False)
            self.register_buffer(f"{operand}_history", torch.empty(history, *shape), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nothing seen yet."""
        for buffer in self.buffers():
            buffer.zero_()

    def known(self, operand: str) -> Tensor:
        """The largest magnitude of the steps before; 0 before the first is over."""
        return self.get_buffer(f"{operand}_history").amax(dim=0)

    def take(self, operand: str, amax: Tensor) -> None:
        """Take a maximum into the present one; what is not finite would stay for ever."""
        now = self.get_buffer(f"{operand}_now")
        torch.maximum(now, torch.where(amax.isfinite(), amax, 0.0), out=now)

    def maxima(self) -> list[Tensor]:
        """The present ones."""
        return [self.get_buffer(f"{operand}_now") for operand in OPERANDS]

    def end_step(self, *, done: bool) -> None:
        """The present maxima move into the history; those of a skipped step do not."""
        for operand in OPERANDS:
            now, history = (self.get_buffer(f"{operand}_{kind}") for kind in ("now", "history"))
            if done:
                history.copy_(torch.cat([now[None], history[:-1]]))
            now.zero_()

    def step_state(self) -> dict[str, Tensor]:
        """The history; between steps nothing else is there."""
        return {operand: self.get_buffer(f"{operand}_history").clone() for operand in OPERANDS}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Copies the history."""
        for operand in OPERANDS:
            self.get_buffer(f"{operand}_history").copy_(state[operand])
