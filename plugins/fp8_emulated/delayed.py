"""Delayed scaling: scales from the largest values of the steps before (Micikevicius et al., arXiv 2209.05433)."""

import torch
from torch import Tensor

from core.contracts.precision import StepState
from core.numerics.exact import ExactState

OPERANDS = ("activation", "weight", "gradient")


class DelayedAmax(ExactState, StepState):
    """The largest magnitudes of a layer's three operands, over the last steps and in the one under way.

    A product only updates the maximum of the step under way, which no product of this step reads. So a batch that is
    recomputed, accumulated or read twice leaves the same maxima. At the end of the step they become the newest of the
    history, and the oldest are dropped.

    Args:
        history: steps that are remembered.
        experts: number of weights with a scale of their own; 0 for a plain layer.
    """

    def __init__(self, history: int, experts: int) -> None:
        super().__init__()
        for operand in OPERANDS:
            shape: tuple[int, ...] = (1, 1)
            if experts and operand == "weight":
                shape = (experts, 1, 1)
            self.register_buffer(f"{operand}_now", torch.empty(shape), persistent=False)
            self.register_buffer(
                f"{operand}_history", torch.empty(history, *shape), persistent=False
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets all maxima to 0."""
        for buffer in self.buffers():
            buffer.zero_()

    def known(self, operand: str) -> Tensor:
        """The largest magnitude of the steps before; 0 until the first has ended."""
        return self.get_buffer(f"{operand}_history").amax(dim=0)

    def take(self, operand: str, amax: Tensor) -> None:
        """Updates the maximum of the step under way; values that are not finite would stay for ever and are skipped."""
        now = self.get_buffer(f"{operand}_now")
        torch.maximum(now, torch.where(amax.isfinite(), amax, 0.0), out=now)

    def maxima(self) -> list[Tensor]:
        """The maxima of the step under way."""
        return [self.get_buffer(f"{operand}_now") for operand in OPERANDS]

    def end_step(self, *, done: bool) -> None:
        """Moves the maxima of the step into the history; those of a skipped step are dropped."""
        for operand in OPERANDS:
            now = self.get_buffer(f"{operand}_now")
            history = self.get_buffer(f"{operand}_history")
            if done:
                history.copy_(torch.cat([now[None], history[:-1]]))
            now.zero_()

    def step_state(self) -> dict[str, Tensor]:
        """A copy of the history, which is all the state that there is between steps."""
        return {operand: self.get_buffer(f"{operand}_history").clone() for operand in OPERANDS}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Sets the history to a saved one."""
        for operand in OPERANDS:
            self.get_buffer(f"{operand}_history").copy_(state[operand])
