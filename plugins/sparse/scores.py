"""Index scores, the distribution of the main attention, and the divergence between them.

None of them holds a score of every head: heads are added up a few at a time, and the backward pass of the index scores
computes them again. What is kept has B x L x S numbers, whatever the number of heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.numerics.promotion import at_least_fp32, wide_product

AT_ONCE = 1 << 24
"""Scores of one sequence that are held at once: heads x queries x keys, at least one head."""


def heads_at_once(queries: int, keys: int) -> int:
    """The number of heads whose scores are held at once; it does not depend on the number of sequences."""
    return max(1, AT_ONCE // (queries * keys))


def index_scores(q_BLHX: Tensor, k_BSX: Tensor, w_BLH: Tensor) -> Tensor:
    """The scores I_ts = sum over heads of w_th relu(q_th . k_s), B x L x S, in fp32 or wider.

    Args:
        q_BLHX: rotated queries of the indexer.
        k_BSX: its rotated keys, one for each token.
        w_BLH: weights of the heads, in fp32 or wider.
    """
    scores_BLS: Tensor = _IndexScores.apply(q_BLHX, k_BSX, w_BLH)  # type: ignore[no-untyped-call]
    return scores_BLS


class _IndexScores(torch.autograd.Function):
    """`index_scores`, which keeps its arguments alone."""

    @staticmethod
    def forward(ctx: Any, q_BLHX: Tensor, k_BSX: Tensor, w_BLH: Tensor) -> Tensor:
        ctx.save_for_backward(q_BLHX, k_BSX, w_BLH)
        rows, queries, heads, _ = q_BLHX.shape
        keys = k_BSX.shape[1]
        step = heads_at_once(queries, keys)
        total_BLS = w_BLH.new_zeros(rows, queries, keys)
        for first in range(0, heads, step):
            positive_BHLS = _products(q_BLHX[:, :, first : first + step], k_BSX).relu()
            w_BHL1 = w_BLH[:, :, first : first + step].transpose(1, 2)[..., None]
            total_BLS = total_BLS + (positive_BHLS * w_BHL1).sum(dim=1)
        return total_BLS

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_BLS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BLHX, k_BSX, w_BLH = ctx.saved_tensors
        keys = k_BSX.shape[1]
        heads = q_BLHX.shape[2]
        step = heads_at_once(q_BLHX.shape[1], keys)
        dq = []
        dw = []
        dk_BSX = torch.zeros_like(at_least_fp32(k_BSX))
        for first in range(0, heads, step):
            q_BLNX = q_BLHX[:, :, first : first + step]
            w_BNL1 = w_BLH[:, :, first : first + step].transpose(1, 2)[..., None]
            product_BNLS = _products(q_BLNX, k_BSX)
            dw.append((product_BNLS.relu() * d_BLS[:, None]).sum(dim=-1).transpose(1, 2))
            d_BNLS = (d_BLS[:, None] * w_BNL1).masked_fill(product_BNLS <= 0, 0)
            d_BAS = d_BNLS.flatten(1, 2).to(q_BLHX.dtype)
            q_BAX = q_BLNX.transpose(1, 2).flatten(1, 2)
            dq_BAX = torch.bmm(d_BAS, k_BSX)
            dq.append(dq_BAX.unflatten(1, (-1, q_BLHX.shape[1])).transpose(1, 2))
            dk_BSX = dk_BSX + wide_product(d_BAS.transpose(1, 2), q_BAX)
        return torch.cat(dq, dim=2), dk_BSX.to(k_BSX.dtype), torch.cat(dw, dim=2)


def _products(q_BLHX: Tensor, k_BSX: Tensor) -> Tensor:
    """The products of the queries of some heads with one key per token, B x H x L x S, in fp32 or wider."""
    q_BAX = q_BLHX.transpose(1, 2).flatten(1, 2)
    product_BAS = wide_product(q_BAX, k_BSX.transpose(1, 2))
    product_BHLS: Tensor = product_BAS.unflatten(1, (q_BLHX.shape[2], -1))
    return product_BHLS


@torch.no_grad()
def mean_attention(q_BLHX: Tensor, k_BSHX: Tensor, scale: float, mask_BLS: Tensor) -> Tensor:
    """The distribution p of the main attention: the sum over heads, divided by their number, B x L x S.

    It has no gradient. The sum over heads is L1-normalised by that, as each head's weights add up to 1.

    Args:
        q_BLHX: rotated queries.
        k_BSHX: rotated keys.
        scale: factor of the scores.
        mask_BLS: bool, the positions that each query attends to; one row of the batch may stand for all.
    """
    rows, queries, heads, _ = q_BLHX.shape
    keys = k_BSHX.shape[1]
    step = heads_at_once(queries, keys)
    total_BLS = at_least_fp32(q_BLHX).new_zeros(rows, queries, keys)
    for first in range(0, heads, step):
        q_BNLX = q_BLHX[:, :, first : first + step].transpose(1, 2)
        k_BNXS = k_BSHX[:, :, first : first + step].permute(0, 2, 3, 1)
        product = wide_product(q_BNLX.flatten(0, 1), k_BNXS.flatten(0, 1))
        scores_BNLS = (product * scale).unflatten(0, (rows, -1))
        scores_BNLS = scores_BNLS.masked_fill(~mask_BLS[:, None], -torch.inf)
        total_BLS = total_BLS + scores_BNLS.softmax(dim=-1).sum(dim=1)
    return total_BLS / heads


def divergence(p_BLS: Tensor, scores_BLS: Tensor, mask_BLS: Tensor) -> Tensor:
    """KL(p || softmax(I)) for each query over the positions of its mask, B x L, in fp32 or wider.

    Args:
        p_BLS: the target, without a gradient; 0 outside the mask.
        scores_BLS: index scores I.
        mask_BLS: bool, at least one position for each query.
    """
    masked_BLS = scores_BLS.masked_fill(~mask_BLS, -torch.inf)
    log_q_BLS = masked_BLS.log_softmax(dim=-1).masked_fill(~mask_BLS, 0)
    parts_BLS: Tensor = torch.special.xlogy(p_BLS, p_BLS) - p_BLS * log_q_BLS
    return parts_BLS.sum(dim=-1)
