"""Sinkhorn and Knopp's normalisation: a matrix of logits becomes one whose rows and columns sum to 1.

A softmax makes positive rows that sum to 1. Then columns and rows are divided by their sums in turn, columns first and
last (mHC, arXiv 2512.24880, equation 9; the softmax and the two epsilons are those of DeepSeek-V4's released code):

    M <- softmax(logits) + eps;    M <- M / (column sums + eps);    rounds - 1 times: rows, then columns

Letters in names: N streams, R rows of the output matrix (input streams), T positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def doubly_stochastic(logits: Tensor, rounds: int, eps: float) -> Tensor:
    """The matrices ... x N x N whose rows and columns sum to 1, as nearly as the rounds reach.

    Sums of columns differ from 1 by about `eps`. Sums of rows do so once the rounds have converged, which takes more of
    them the further apart the logits are.

    Args:
        logits: ... x N x N, in fp32 or wider.
        rounds: how often columns are normalised, at least 1.
        eps: added to every entry once, and to every sum.
    """
    # The positions come last, because the sums then run over whole vectors of them: four times as fast on a CPU.
    by_position_NNT = logits.flatten(0, -3).permute(1, 2, 0)
    if torch.compiler.is_compiling():
        # A compiler fuses the rounds, and decides itself what it keeps.
        balanced_NNT = _halves(by_position_NNT.softmax(dim=1) + eps, rounds, eps)[-1][0]
    else:
        balanced_NNT = _Sinkhorn.apply(by_position_NNT, rounds, eps)  # type: ignore[no-untyped-call]
    balanced: Tensor = balanced_NNT.permute(2, 0, 1).reshape(logits.shape)
    return balanced


def _halves(start_NNT: Tensor, rounds: int, eps: float) -> list[tuple[Tensor, Tensor, int]]:
    """Every half round: the matrices after it, the sums that it divided by, and the axis that it summed over."""
    done: list[tuple[Tensor, Tensor, int]] = []
    matrix_NNT = start_NNT
    for half in range(2 * rounds - 1):
        axis = half % 2  # 0: sums of columns, which run over the rows
        sums = matrix_NNT.sum(dim=axis, keepdim=True) + eps
        matrix_NNT = matrix_NNT / sums
        done.append((matrix_NNT, sums, axis))
    return done


class _Sinkhorn(torch.autograd.Function):
    """The same with a backward that keeps the logits alone and computes the rounds again.

    Autograd would keep four tensors of every half round, at 20 rounds 10 KiB for each position of each layer.
    """

    @staticmethod
    def forward(ctx: Any, logits_NNT: Tensor, rounds: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits_NNT)
        ctx.rounds = rounds
        ctx.eps = eps
        return _halves(logits_NNT.softmax(dim=1) + eps, rounds, eps)[-1][0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NNT: Tensor) -> tuple[Tensor, None, None]:
        (logits_NNT,) = ctx.saved_tensors
        softmax_NNT = logits_NNT.softmax(dim=1)
        for after_NNT, sums, axis in reversed(_halves(softmax_NNT + ctx.eps, ctx.rounds, ctx.eps)):
            # y = x / (sum x + eps):  dx = (dy - sum(dy y)) / (sum x + eps)
            inner = (gradient_NNT * after_NNT).sum(dim=axis, keepdim=True)
            gradient_NNT = (gradient_NNT - inner) / sums
        inner = (gradient_NNT * softmax_NNT).sum(dim=1, keepdim=True)
        return softmax_NNT * (gradient_NNT - inner), None, None
