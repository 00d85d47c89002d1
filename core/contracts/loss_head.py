"""The loss-head slot: what the model is trained to say."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.record import Metric, Record, StepTotals, as_pytree
from core.contracts.schedule import Progress


@dataclass(frozen=True)
class Shared:
    """The model's own embedding and output, which heads share and never own.

    Args:
        embed: token ids B x L -> B x L x D.
        logits: hidden states after a norm, ... x D -> ... x V.
    """

    embed: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]


@as_pytree
@dataclass(frozen=True)
class HeadOutput:
    """What a head returns for one micro-batch.

    Args:
        terms: losses by name, as sums over what `counts` counts, before coefficients.
        records: what the layers of each block that the head owns saw, by the block's path in the head, then by the
            layer's name in the block (`attention`, `ffn`).
        metrics: numbers to report in evaluation, by name.
        tallies: int64 counts for `on_step_end`, by name.
    """

    terms: dict[str, Tensor]
    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)


class LossHead(nn.Module, Component, ABC):
    """Turns hidden states into named losses.

    `counts` tells every term's denominator from the data alone, before any forward, so that a window's
    losses are means over the whole window however it is split.
    """

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, hidden_BLD: Tensor, context: SequenceContext, shared: Shared) -> HeadOutput:
        """`hidden_BLD` is the main model's output after its final norm."""

    @abstractmethod
    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        """The denominator of each term for this micro-batch."""

    def contexts(self, context: SequenceContext) -> dict[str, SequenceContext]:
        """What each of the head's own blocks sees, by the block's path in the head, from the data alone."""
        return {}

    @abstractmethod
    def coefficient(self, progress: Progress) -> float:
        """What each of the head's mean losses is multiplied by at this position of the run."""

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        """Update the head's state after an optimizer step that was not skipped."""

    @abstractmethod
    def costs(self) -> Costs:
        """For one token, the head's own use of the shared output included."""
