"""Cross-entropy as a sum over the positions that count, taken in pieces."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from core.numerics import compiling
from core.numerics.linear import plain_matrix
from core.numerics.promotion import at_least_fp32

IGNORED = -100
ROWS = 512
"""Rows of logits in a piece: large enough for the product, small enough to stay in the processor's cache."""
MANY_ROWS = 8192
"""The same on GPUs, where every piece reads the output's weight anew and adds to its gradient."""


def cross_entropy_sum(
    logits: Callable[[Tensor], Tensor],
    hidden_BLD: Tensor,
    targets_BL: Tensor,
    counted_BL: Tensor,
    losses_T: Tensor | None = None,
) -> Tensor:
    """Sum of -log p(target) in nats over the counted positions, in fp32 or wider; 0 if there is none.

    Args:
        logits: hidden states to logits, rows x D -> rows x V.
        hidden_BLD: states from which the targets are predicted.
        targets_BL: int64 token ids.
        counted_BL: bool, which positions count.
        losses_T: is filled with the loss of each position, T = B x L, without a gradient, for reports; None: it is not
            needed.
    """
    hidden_TD = hidden_BLD.flatten(0, 1)
    targets_T = targets_BL.masked_fill(~counted_BL, IGNORED).flatten()
    weight_VD = _fused_weight(logits, hidden_TD)
    if weight_VD is not None:
        result: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, losses_T)  # type: ignore[no-untyped-call]
        return result
    total = at_least_fp32(hidden_TD[:0]).sum()
    rows = MANY_ROWS if hidden_BLD.is_cuda else ROWS
    pieces = zip(hidden_TD.split(rows), targets_T.split(rows), strict=True)
    for number, (rows_RD, targets_R) in enumerate(pieces):
        wide_RV = at_least_fp32(logits(rows_RD))
        if losses_T is not None:
            losses_R = F.cross_entropy(
                wide_RV.detach(), targets_R, ignore_index=IGNORED, reduction="none"
            )
            losses_T[number * rows : number * rows + len(losses_R)] = losses_R
        total = total + F.cross_entropy(wide_RV, targets_R, ignore_index=IGNORED, reduction="sum")
    return total


def _fused_weight(logits: Callable[[Tensor], Tensor], hidden_TD: Tensor) -> Tensor | None:
    """The output's weight, where product and loss are one function: in training on CPUs, in fp32 or wider."""
    if not compiling.is_eager_on_cpu(hidden_TD) or not torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    weight_VD = plain_matrix(logits)
    if weight_VD is None or weight_VD.dtype != hidden_TD.dtype:
        return None
    return weight_VD if at_least_fp32(weight_VD).dtype == weight_VD.dtype else None


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss and its gradients, piece by piece: logits live in one buffer, and none are saved for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        losses_T: Tensor | None,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden_TD = torch.empty_like(hidden_TD) if needs_hidden else hidden_TD[:0]
        dweight_VD = torch.zeros_like(weight_VD) if needs_weight else weight_VD[:0]
        total = hidden_TD.new_zeros(())
        buffer_RV = hidden_TD.new_empty(min(ROWS, len(hidden_TD)), len(weight_VD))
        for begin in range(0, len(hidden_TD), ROWS):
            piece = slice(begin, begin + ROWS)
            hidden_RD = hidden_TD[piece]
            logits_RV = buffer_RV[: len(hidden_RD)]
            torch.mm(hidden_RD, weight_VD.t(), out=logits_RV)
            losses_R1 = _losses_and_gradients_(logits_RV, targets_T[piece])
            total += losses_R1.sum()
            if losses_T is not None:
                losses_T[piece] = losses_R1[:, 0]
            if needs_hidden:
                torch.mm(logits_RV, weight_VD, out=dhidden_TD[piece])
            if needs_weight:
                torch.addmm(dweight_VD, logits_RV.t(), hidden_RD, out=dweight_VD)
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden_TD, dweight_VD = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden = dhidden_TD * dtotal if needs_hidden else None
        dweight = dweight_VD * dtotal if needs_weight else None
        return dhidden, dweight, None, None


def _losses_and_gradients_(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """The loss of each row, 0 where the target is ignored; the logits become its gradients: softmax - one-hot."""
    counted_R1 = (targets_R != IGNORED)[:, None]
    targets_R1 = targets_R.masked_fill(targets_R == IGNORED, 0)[:, None]
    target_logits_R1 = logits_RV.gather(1, targets_R1)
    largest_R1 = logits_RV.amax(dim=1, keepdim=True)
    sums_R1 = logits_RV.sub_(largest_R1).exp_().sum(dim=1, keepdim=True)
    losses_R1 = sums_R1.log() + (largest_R1 - target_logits_R1)
    logits_RV.mul_(counted_R1 / sums_R1)
    logits_RV.scatter_add_(1, targets_R1, -counted_R1.to(logits_RV.dtype))
    return losses_R1.masked_fill(~counted_R1, 0)
