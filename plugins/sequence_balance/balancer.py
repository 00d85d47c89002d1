"""The complementary sequence-wise balance loss (report, eq. 17-20).

For each sequence of T tokens: f_i = E / (K T) x how many of its tokens have expert i among the top K by the
*unbiased* affinity, without any group limit; P_i = the mean over its tokens of the affinity, normalised over
the experts for each token; loss = sum_i f_i P_i. f carries no gradient. At a uniform load the loss is exactly
1, so the coefficient alpha is its value there.

A sequence is the packed window, or each document's piece of it where documents are kept apart.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.contracts.record import LossTerm
from core.contracts.router import Routing
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting


class SequenceLoss(Balancer):
    """alpha times the mean over sequences of sum_i f_i P_i."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), eq. 17-20"
    scope = "sequence"
    needs = frozenset({"learned"})
    example = {"name": "sequence", "alpha": 0.0001}

    @dataclass(kw_only=True)
    class Config:
        """Settings of the sequence-wise loss."""

        alpha: Scheduled = setting(0.0001, doc="coefficient (DeepSeek-V3: 0.0001)")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` for a negative coefficient."""
            check_scheduled(self.alpha, "alpha", low=0)

    def __init__(self, config: Config, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.config = config

    def observe(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """For each sequence N: how often each expert is chosen, the sum of its share, and the tokens."""
        piece_T, pieces = _pieces(context)
        valid_T = context.valid().flatten()
        scores_TE = routing.scores_TE
        share_TE = scores_TE / (scores_TE.sum(dim=1, keepdim=True) + 1e-20)
        share_TE = share_TE * valid_T[:, None].to(share_TE.dtype)
        with torch.no_grad():
            top_TK = scores_TE.topk(self.top_k, dim=1).indices
            chosen_TE = torch.zeros_like(scores_TE).scatter(1, top_TK, 1.0) * valid_T[:, None].to(scores_TE.dtype)
        zeros_NE = scores_TE.new_zeros(pieces, self.experts)
        tokens_N = scores_TE.new_zeros(pieces).index_add(0, piece_T, valid_T.to(scores_TE.dtype))
        return {
            "chosen_NE": zeros_NE.index_add(0, piece_T, chosen_TE),
            "share_NE": zeros_NE.index_add(0, piece_T, share_TE),
            "tokens_N": tokens_N,
        }

    def count(self, context: SequenceContext) -> Tensor:
        """Sequences with at least one valid token."""
        piece_T, pieces = _pieces(context)
        tokens_N = torch.zeros(pieces, dtype=torch.int64, device=piece_T.device)
        return (tokens_N.index_add(0, piece_T, context.valid().flatten().to(torch.int64)) > 0).sum()

    def loss(self, sums: dict[str, Tensor]) -> LossTerm:
        """Eq. 17, summed over sequences."""
        tokens_N1 = sums["tokens_N"].clamp(min=1)[:, None]
        f_NE = sums["chosen_NE"] * (self.experts / self.top_k) / tokens_N1
        p_NE = sums["share_NE"] / tokens_N1
        return LossTerm((f_NE * p_NE).sum(), (sums["tokens_N"] > 0).sum())

    def coefficient(self, progress: Progress) -> float:
        """alpha."""
        return value_at(self.config.alpha, progress)


def _pieces(context: SequenceContext) -> tuple[Tensor, int]:
    """The sequence that each token belongs to, and how many there are."""
    batch, length = context.tokens_BL.shape
    row_BL = torch.arange(batch, device=context.tokens_BL.device)[:, None].expand(batch, length)
    if context.documents_BM is None:
        return row_BL.reshape(-1), batch
    documents_BL = context.documents_BM[:, :length]
    begins_BL = torch.ones_like(documents_BL, dtype=torch.int64)
    begins_BL[:, 1:] = (documents_BL[:, 1:] != documents_BL[:, :-1]).to(torch.int64)
    piece_T = begins_BL.flatten().cumsum(0) - 1
    return piece_T, int(piece_T[-1]) + 1
