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
    """One load-balancing method of one layer: its state, its say in selection, its loss, its update.

    In the order of a step: `adjust` inside the router; `observe` and `tally` inside the layer, pure, so that they may
    be recomputed; `loss` outside it, after the reduction that `scope` asks for; `on_step_end` once per optimizer
    step that was not skipped, with the integer load and tallies of the whole window over all data ranks.

    Padding counts nowhere. A loss teaches the router and nothing else of the layer; its coefficient is a finite number
    that is not negative. All state is in the state dict and keeps its format under a cast of the model
    (`core.numerics.exact.ExactState`); an update sees one token more however large the load is.

    Class attributes:
        scope: over what the loss is formed; an instance may set its own. `none`: no loss. `token` and `sequence`:
            each by itself, so splitting a batch changes nothing. `batch`: all tokens of the step, over
            micro-batches and data ranks, so splitting changes nothing either; where a step has several
            micro-batches, they are all read once more beforehand. `micro_batch`: all data ranks of one
            micro-batch, so accumulation does change it.
        needs: capabilities that the layer's router must have.
    """

    scope: Scope = "none"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__()
        self.experts, self.top_k = experts, top_k

    def adjust(self, scores_TE: Tensor) -> Tensor:
        """Scores for selection only; no gradient goes through the method's state."""
        return scores_TE

    def observe(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """The sums that the loss is made of, for one micro-batch; they carry the gradient."""
        return {}

    def count(self, context: SequenceContext) -> Tensor | None:
        """How many losses this micro-batch adds (tokens, sequences, or 1), from the data alone; None without a loss."""
        return None

    def loss(self, sums: dict[str, Tensor]) -> Tensor | None:
        """The loss of what was observed, summed, before its coefficient; its denominator is `count(context)`."""
        return None

    def tally(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """Integers that `on_step_end` needs beside the load, by name, for one micro-batch.

        Returns:
            int64 tensors whose shape no data changes; they are added up exactly over micro-batches and data ranks.
        """
        return {}

    def coefficient(self, progress: Progress) -> float:
        """What the layer's mean loss is multiplied by at this position of the run."""
        return 0.0

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        """Update the method's state from the int64 load and tallies of the whole step. Called for every balancer."""

    def selection_bias(self) -> Tensor | None:
        """The bias b_E that `adjust` adds, for the run's log; None where there is none."""
        return None

    def metrics(self) -> dict[str, Tensor]:
        """What to log of the state, by name."""
        return {}
