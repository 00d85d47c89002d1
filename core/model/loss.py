"""Cross-entropy as a sum over the positions that count, taken in pieces."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from core.numerics.promotion import at_least_fp32

IGNORED = -100
ROWS = 512
"""Rows of logits in a piece: large enough for the product, small enough to stay out of fresh memory maps."""
MANY_ROWS = 8192
"""The same on GPUs, where every piece reads the output's weight anew and adds to its gradient."""


def cross_entropy_sum(
    logits: Callable[[Tensor], Tensor], hidden_BLD: Tensor, targets_BL: Tensor, counted_BL: Tensor
) -> Tensor:
    """Sum of -log p(target) in nats over the counted positions, in fp32 or wider; 0 if there is none.

    Args:
        logits: hidden states to logits, rows x D -> rows x V.
        hidden_BLD: states from which the targets are predicted.
        targets_BL: int64 token ids.
        counted_BL: bool, which positions count.
    """
    hidden_TD = hidden_BLD.flatten(0, 1)
    targets_T = targets_BL.masked_fill(~counted_BL, IGNORED).flatten()
    total = at_least_fp32(hidden_TD[:0]).sum()
    rows = MANY_ROWS if hidden_BLD.is_cuda else ROWS
    for rows_RD, targets_R in zip(hidden_TD.split(rows), targets_T.split(rows), strict=True):
        wide_RV = at_least_fp32(logits(rows_RD))
        total = total + F.cross_entropy(wide_RV, targets_R, ignore_index=IGNORED, reduction="sum")
    return total
