"""The loss of tokens by how much of their own document precedes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from core.contracts.context import SequenceContext
from core.model.language_model import LanguageModel

BOUNDS = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Where the ranges of preceding tokens begin."""


@dataclass(frozen=True)
class PositionLoss:
    """The loss of the tokens that have a certain number of tokens of their document before them.

    Args:
        first: the fewest preceding tokens.
        last: the most.
        tokens: how many tokens are predicted.
        nats: the sum of -log p over them.
    """

    first: int
    last: int
    tokens: int
    nats: float

    @property
    def loss(self) -> float | None:
        """The mean in nats; None without tokens."""
        return self.nats / self.tokens if self.tokens else None


def preceding(documents_BM: Tensor) -> Tensor:
    """The tokens of its own document before each target, as far as its sequence reaches: int64 B x L.

    Args:
        documents_BM: the document of every input and of the last target, M = L + 1.
    """
    places_M = torch.arange(documents_BM.shape[1], device=documents_BM.device)
    begins_BM = torch.zeros_like(documents_BM, dtype=torch.bool)
    begins_BM[:, 0] = True
    begins_BM[:, 1:] = documents_BM[:, 1:] != documents_BM[:, :-1]
    begin_BM = torch.where(begins_BM, places_M, 0).cummax(dim=1).values
    return (places_M - begin_BM)[:, 1:]


@torch.no_grad()
def loss_by_position(
    model: LanguageModel, read: Iterable[tuple[SequenceContext, Tensor]], length: int
) -> list[PositionLoss]:
    """The loss of the next token in ranges of preceding tokens, which together hold every valid token once.

    Args:
        model: the model in evaluation mode.
        read: micro-batches with targets, each with the documents B x M of its inputs and last targets.
        length: tokens of a sequence, L.
    """
    bounds = ranges(length)
    starts = torch.tensor([first for first, _ in bounds])
    tokens = torch.zeros(len(bounds), dtype=torch.int64)
    nats = torch.zeros(len(bounds), dtype=torch.float64)
    for context, documents_BM in read:
        assert context.targets_BL is not None
        hidden_BLD, _ = model.hidden(context)
        valid_BL = context.predicted().cpu()
        before_BL = preceding(documents_BM).cpu()
        # One sequence at a time: the logits of a long batch would not fit.
        for row, hidden_LD in enumerate(hidden_BLD):
            logits_LV = model.output(hidden_LD).double()
            loss_L = cross_entropy(logits_LV, context.targets_BL[row], reduction="none").cpu()
            counted_L = valid_BL[row]
            index = torch.bucketize(before_BL[row][counted_L], starts, right=True) - 1
            tokens += torch.bincount(index, minlength=len(bounds))
            nats += torch.bincount(index, loss_L[counted_L], minlength=len(bounds))
    found = zip(bounds, tokens.tolist(), nats.tolist(), strict=True)
    return [PositionLoss(first, last, count, total) for (first, last), count, total in found]


def ranges(length: int) -> Sequence[tuple[int, int]]:
    """The ranges of preceding tokens in sequences of `length`, first and last."""
    begins = [begin for begin in BOUNDS if begin < length]
    ends = [*(begin - 1 for begin in begins[1:]), length]
    return list(zip(begins, ends, strict=True))
