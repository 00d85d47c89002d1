"""The data of one micro-batch of one rank."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """B sequences of L tokens, with the token to be predicted after each.

    Args:
        tokens_BL: int64, the inputs.
        targets_BL: int64, the token that follows each input.
        valid_BL: bool, False at padding: such a position is neither counted (load, losses, FLOPs) nor predicted.
        documents_BM: int64, M = L + 1: which document of the stream each input, and the last target, belongs to; it
            never falls along a sequence, so attention and multi-token heads can stop at a change. Padding counts as
            a document of its own.
        learned_BM: bool, which of the inputs and of the last target are learned where they are targets; None: all.
        source_B: int64, the number of the source of each sequence; None: one source.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    valid_BL: Tensor
    documents_BM: Tensor
    learned_BM: Tensor | None = None
    source_B: Tensor | None = None
