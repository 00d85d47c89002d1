"""Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318).

A cheap model has drafted tokens x_1 ... x_N, each from its own distribution q_j. One pass of the model gives its
distributions p_1 ... p_N+1 at the same places. Draft x_j is accepted with probability min(1, p_j(x_j) / q_j(x_j)). At
the first draft that is not accepted the token is drawn from the residual max(0, p_j - q_j), scaled up to 1; if all are
accepted, one more is drawn from p_N+1. Every token is then distributed as the model alone would have drawn it:

    q(x) min(1, p(x) / q(x))  +  (1 - sum_y min(p(y), q(y))) residual(x)  =  min(p, q)(x) + max(0, p - q)(x)  =  p(x)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.generation.sampling import draw


@dataclass(frozen=True)
class Verified:
    """What becomes of the drafts of a pass.

    Args:
        accepted_B: int64, how many of each row's first drafts are accepted.
        next_B: int64, the token after these.
    """

    accepted_B: Tensor
    next_B: Tensor


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """The probability min(1, p / q) with which a draft is accepted; 0 where q is 0, because nothing is drafted there.

    Args:
        p: probabilities of drafts under the model.
        q: those under the distribution that they were drawn from, of the same shape.
    """
    ratio = p / torch.where(q > 0, q, 1.0)
    return torch.where(q > 0, ratio.clamp(max=1.0), 0.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The distribution max(0, p - q), scaled up to 1, of the token at a draft that is not accepted: ... x V.

    Where p and q are equal every draft is accepted, and the result, which nobody needs, is p.
    """
    rest = (p - q).clamp(min=0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / torch.where(total > 0, total, 1.0), p)


def verify(
    drafts_BN: Tensor,
    counts_B: Tensor,
    p_BMV: Tensor,
    q_BNV: Tensor,
    accept_BN: Tensor,
    draw_BM: Tensor,
) -> Verified:
    """Accepts drafts, and draws the token after the accepted ones.

    Args:
        drafts_BN: the drafts, N for each row.
        counts_B: how many of these count; a row at its end has fewer.
        p_BMV: the model's distributions at the N drafts and after them, M = N + 1.
        q_BNV: the distributions that the drafts were drawn from.
        accept_BN: numbers in [0, 1) that decide whether a draft is accepted.
        draw_BM: numbers in [0, 1) for the token after the accepted ones, by its place.
    """
    drafted_BN1 = drafts_BN[:, :, None]
    p_BN = p_BMV[:, :-1].gather(-1, drafted_BN1)[..., 0]
    q_BN = q_BNV.gather(-1, drafted_BN1)[..., 0]
    accepted_B = _leading(accept_BN < acceptance(p_BN, q_BN), counts_B)
    row_B = torch.arange(len(drafts_BN), device=drafts_BN.device)
    p_BV = p_BMV[row_B, accepted_B]
    q_BV = q_BNV[row_B, accepted_B.clamp(max=q_BNV.shape[1] - 1)]
    all_accepted_B1 = (accepted_B == counts_B)[:, None]
    last_BV = torch.where(all_accepted_B1, p_BV, residual(p_BV, q_BV))
    return Verified(accepted_B, draw(last_BV, draw_BM[row_B, accepted_B]))


def verify_greedy(drafts_BN: Tensor, counts_B: Tensor, best_BM: Tensor) -> Verified:
    """`verify` for distributions in which one token has all the probability.

    Args:
        drafts_BN: the drafts.
        counts_B: how many of these count.
        best_BM: the model's most likely tokens at the N drafts and after them.
    """
    accepted_B = _leading(drafts_BN == best_BM[:, :-1], counts_B)
    row_B = torch.arange(len(drafts_BN), device=drafts_BN.device)
    return Verified(accepted_B, best_BM[row_B, accepted_B])


def _leading(flags_BN: Tensor, counts_B: Tensor) -> Tensor:
    """How many of the first `counts_B` flags of each row are True before the first that is False: int64 B."""
    place_N = torch.arange(flags_BN.shape[1], device=flags_BN.device)
    counted_BN = flags_BN & (place_N < counts_B[:, None])
    return counted_BN.to(torch.int64).cumprod(dim=1).sum(dim=1)
