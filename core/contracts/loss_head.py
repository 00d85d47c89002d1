"""The loss-head slot: what the model is trained to predict."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.contracts.attention import Cache
from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.record import Metric, Record, StepTotals, as_pytree
from core.contracts.schedule import Progress


@dataclass(frozen=True)
class SharedModules:
    """The model's own embedding and output, which heads share and never own.

    Args:
        embed: token ids B x L -> B x L x D.
        logits: hidden states after a norm, ... x D -> ... x V.
        states: the collapsed states B x L x D after each block that the head's `reads_blocks` names, by its index.
        stream: the residual stream after the last block, before it is collapsed; None unless the head `reads_streams`.
    """

    embed: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    states: Mapping[int, Tensor] = field(default_factory=dict)
    stream: Tensor | None = None


@dataclass(frozen=True)
class Draft:
    """What a head drafts in decoding.

    Args:
        logits_BLV: the logits, at each position, of the token after the one that was given, from `shared.logits`, which
            in decoding may choose the positions for which it computes them.
        state_BLD: the state at each position, from which the token after the next one can be drafted; the whole stream
            if the head `reads_streams`.
    """

    logits_BLV: Tensor
    state_BLD: Tensor


@as_pytree
@dataclass(frozen=True)
class HeadOutput:
    """What a head returns for one micro-batch.

    Args:
        terms: losses by name, as sums over what `counts` counts, before coefficients.
        records: the records of the layers in each block that the head owns, by the block's path in the head, then by
            the layer's name in the block (`attention`, `ffn`).
        metrics: numbers to report in evaluation, by name.
        tallies: int64 counts for `on_step_end`, by name.

    Names are the same in every batch, as in a `Record`.
    """

    terms: dict[str, Tensor]
    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)


class LossHead(nn.Module, Component, ABC):
    """Turns hidden states into named losses.

    `counts` gives every term's denominator from the data alone, before any forward, so that a window's losses are
    means over the whole window however it is split into micro-batches and ranks.

    Class attributes:
        drafts: whether `draft` can be called in decoding.
        reads_embedding: whether `forward` may call `SharedModules.embed`. A head that never does says so: a strategy
            that puts layers on different ranks then keeps no copy of the embedding beside the head.

    Attributes:
        reads_streams: whether the head reads the residual stream before it is collapsed (`SharedModules.stream`). A
            head whose settings decide it sets it on the instance.
    """

    reads_streams: bool = False
    drafts: ClassVar[bool] = False
    reads_embedding: ClassVar[bool] = True

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, hidden_BLD: Tensor, context: SequenceContext, shared: SharedModules
    ) -> HeadOutput:
        """Computes the head's losses; `hidden_BLD` is the main model's output after its final norm."""

    @abstractmethod
    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        """The denominator of each term for this micro-batch."""

    @property
    def draft_depths(self) -> int:
        """The number of modules that draft: draft k of a pass comes from module k, later ones from the last module."""
        return 1

    @property
    def reads_blocks(self) -> Sequence[int]:
        """Indices of the blocks whose states the head reads (`SharedModules.states`)."""
        return ()

    def draft(
        self,
        state_BLD: Tensor,
        context: SequenceContext,
        shared: SharedModules,
        caches: Sequence[Cache],
        depth: int = 1,
    ) -> Draft:
        """Predicts the token after a known one, in decoding.

        Module 1 reads the main model's states, module k the states of module k - 1 for the tokens before these. The
        last module reads its own states where there are more drafts than modules.

        Args:
            state_BLD: the main model's state after its final norm, or its stream before it is collapsed if the head
                `reads_streams`; or the state of an earlier draft.
            context: the tokens that follow these states, at their own positions.
            shared: what `forward` receives; `states` are those of the same positions.
            caches: what `new_draft_caches` returned for this depth; these positions are appended to them.
            depth: the module, from 1 to `draft_depths`.

        Raises:
            NotImplementedError: the head does not draft.
        """
        raise NotImplementedError(f"{type(self).__name__} does not draft")

    def new_draft_caches(
        self, rows: int, capacity: int, device: torch.device | None = None, depth: int = 1
    ) -> list[Cache]:
        """Makes empty caches for one module, as `Attention.new_cache` does; none where it keeps nothing."""
        return []

    def contexts(self, context: SequenceContext) -> dict[str, SequenceContext]:
        """The sequence context of each of the head's own blocks, by the block's path in it, from the data alone."""
        return {}

    @abstractmethod
    def coefficient(self, progress: Progress) -> float:
        """The factor of each of the head's mean losses at this position of the run."""

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        """Updates the head's state after an optimizer step that was not skipped."""

    @abstractmethod
    def costs(self) -> Costs:
        """The costs of one token, the head's own use of the shared output included."""
