"""The balancer slot: everything that one load-balancing method owns."""

from abc import ABC
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from core.contracts.build import BuildContext
from core.contracts.component import Component
from core.contracts.context import SequenceContext
from core.contracts.record import StepTotals
from core.contracts.router import Routing
from core.contracts.schedule import Progress

Scope = Literal["none", "token", "sequence", "batch", "micro_batch"]


class Balancer(nn.Module, Component, ABC):
    """One load-balancing method of one layer: its state, its effect on selection, its loss and its update.

    A step calls the methods in this order. `adjust_scores` runs inside the router. `observe` and `tally` run inside
    the layer and are pure, so that they may be recomputed. `loss` runs outside the layer, after the reduction that
    `scope` names. `on_step_end` runs once for each optimizer step that was not skipped, with the integer load and
    tallies of the whole window over all data ranks.

    Padding counts nowhere. A loss sends gradients to the router and to nothing else in the layer; its coefficient is
    finite and not negative. All state is in the state dict and keeps its format under a cast of the model
    (`core.numerics.exact.ExactState`). An update distinguishes loads that differ by one token, however large they are.

    Class attributes:
        scope: the tokens over which one loss is formed; an instance may set its own. `none`: no loss. `token` and
            `sequence`: each token or sequence by itself, so splitting a batch changes nothing. `batch`: all tokens of
            the step, over micro-batches and data ranks, so splitting changes nothing either; if a step has several
            micro-batches, they are all read once more beforehand. `micro_batch`: all data ranks of one
            micro-batch, so accumulation does change it.
        needs: capabilities that the layer's router must have.
        is_frozen: whether the recipe's `freeze` has chosen its state; `on_step_end` is then not called.
    """

    scope: Scope = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_frozen: bool = False

    def __init__(self, config: Any, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__()
        self.experts = experts
        self.top_k = top_k

    def adjust_scores(self, scores_TE: Tensor) -> Tensor:
        """Returns the scores that experts are selected by, T x E; no gradient goes through the method's state."""
        return scores_TE

    def observe(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """Returns the sums that the loss is computed from, for one micro-batch; they carry the gradient."""
        return {}

    def count(self, context: SequenceContext) -> Tensor | None:
        """Returns how many losses this micro-batch adds (tokens, sequences, or 1), from the data alone.

        None without a loss.
        """
        return None

    def loss(self, sums: dict[str, Tensor]) -> Tensor | None:
        """Returns the summed loss of what was observed, before its coefficient; its denominator is `count(context)`."""
        return None

    def tally(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """Returns the integers that `on_step_end` needs beside the load, by name, for one micro-batch.

        Returns:
            int64 tensors whose shape no data changes; they are added up exactly over micro-batches and data ranks.
        """
        return {}

    def coefficient(self, progress: Progress) -> float:
        """The factor of the layer's mean loss at this position of the run."""
        return 0.0

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        """Updates the state from the int64 load and tallies of the whole step; not called if it `is_frozen`."""

    def selection_bias(self) -> Tensor | None:
        """The bias b_E that `adjust_scores` adds, for the run's log; None if there is none."""
        return None

    def metrics(self) -> dict[str, Tensor]:
        """Numbers about the state that the run logs, by name."""
        return {}
