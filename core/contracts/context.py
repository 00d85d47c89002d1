"""The sequences that a layer works on.

Shapes: B batch, L length of the tokens given, M = L + 1 (the inputs and the last target).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def identity(tensor: Tensor) -> Tensor:
    """Returns the tensor itself, which is the sum over data ranks if there is one rank."""
    return tensor


@dataclass(frozen=True)
class SequenceContext:
    """One micro-batch, as attention, feed-forward and loss heads see it.

    Args:
        tokens_BL: int64 token ids.
        positions_BL: int64 positions, B x L, or 1 x L if all sequences share them; in decoding they start at each
            row's length in the cache.
        targets_BL: the token that follows each token; None if nothing is to be predicted.
        valid_BL: bool, False for padding, which counts nowhere: not in losses, load, capacity or FLOPs.
            None: every token is valid.
        documents_BM: int64 document of every input token and of the last target; None: attention and
            multi-token prediction run across documents, as DeepSeek trains.
        learned_BM: bool, whether each input and the last target is learned where it is a target (the answers of a
            chat, for example); the others still take part in attention, load and capacity. None: all are learned.
        source_B: int64, number of the corpus that each sequence comes from, for losses by source; None: one source.
        source_names: the names of all sources, by number, if losses are reported by source; the same in every batch.
        step: optimizer steps done before this one.
        first_sequence: number of the first sequence among all that the step reads, over micro-batches and data
            ranks. Random choices are addressed by (seed, step, layer, number of the sequence, position), see
            `core.routing.chance`, so splitting a batch changes none of them.
        reduce_sum: sum over the data ranks, differentiable; the identity on one device.
        recorded: whether layers must return records. Decoding reads none: a feed-forward layer with experts may then
            return None for its record, and skip what it would count.
    """

    tokens_BL: Tensor
    positions_BL: Tensor
    targets_BL: Tensor | None = None
    valid_BL: Tensor | None = None
    documents_BM: Tensor | None = None
    learned_BM: Tensor | None = None
    source_B: Tensor | None = None
    source_names: tuple[str, ...] = ()
    step: int = 0
    first_sequence: int = 0
    reduce_sum: Callable[[Tensor], Tensor] = identity
    recorded: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_computed", {})

    @classmethod
    def of(cls, tokens_BL: Tensor, *, start: int = 0, **rest: Any) -> "SequenceContext":
        """Makes the context of token ids whose first position is `start`; `rest` are further fields."""
        positions_L = torch.arange(start, start + tokens_BL.shape[1], device=tokens_BL.device)
        return cls(tokens_BL, positions_L[None], **rest)

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """What `compute` returns, computed for the first layer that asks and kept for the others.

        For values in decoding that depend on nothing but this context and the rows' lengths: rotary tables, masks.

        Args:
            key: tells the values of one context apart; hashable.
            compute: makes the value.
        """
        computed: dict[Any, Any] = self._computed  # type: ignore[attr-defined]
        if key not in computed:
            computed[key] = compute()
        value: T = computed[key]
        return value

    def valid(self) -> Tensor:
        """The mask valid_BL, all True if it is not given."""
        if self.valid_BL is None:
            return torch.ones_like(self.tokens_BL, dtype=torch.bool)
        return self.valid_BL

    def predicted(self, depth: int = 0) -> Tensor:
        """The mask of positions that predict a token `depth` past the next one: bool, B x (L - depth).

        These are the positions of `within(depth)` whose target is learned; losses and their denominators use them.
        """
        mask = self.within(depth)
        if self.learned_BM is not None:
            mask = mask & self.learned_BM[:, depth + 1 :]
        return mask

    def within(self, depth: int = 0) -> Tensor:
        """The mask of positions that have every token which predicting `depth` past the next one reads.

        It is bool, B x (L - depth). Position i of depth k sees the tokens up to i + k and predicts token i + k + 1
        (report, eq. 21-24). It is True where none of these is padding and, where documents are kept apart, all are
        from one document. Load and capacity of a multi-token module count these positions, whether their targets are
        learned or not.
        """
        length = self.tokens_BL.shape[1]
        valid_BL = self.valid()
        mask = valid_BL[:, depth:] & valid_BL[:, : length - depth]
        if self.documents_BM is not None:
            target_BL = self.documents_BM[:, depth + 1 :]
            mask = mask & (target_BL == self.documents_BM[:, : length - depth])
        return mask
