"""The family of balance losses sum_i f_i P_i: how often expert i is chosen, times its mean share of affinity.

DeepSeekMoE (arXiv 2401.06066, eq. 12-14), DeepSeek-V3 (report, eq. 17-20), Switch (arXiv 2101.03961, eq. 4-6) and
GShard (arXiv 2006.16668, algorithm 1) differ in what counts as a choice, over which tokens both are formed, and by
a constant. Here, over the T valid tokens of a group,

    f_i = E / (K T) x how many of them choose expert i             no gradient
    P_i = 1 / T     x sum of each one's share: its affinity over the sum of all its affinities

so that sum_i f_i P_i is exactly 1 where the choices are even. Normalising the affinity changes nothing for a
softmax; for a sigmoid it means that a token cannot buy a lower loss by making all its affinities small.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts.balancer import Balancer, Scope
from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.contracts.router import Routing
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting
from core.routing.groups import TokenGroups, token_groups


@dataclass(kw_only=True)
class Coefficient:
    """Settings of a loss with a coefficient, for which each method has its own default."""

    alpha: Scheduled = setting(doc="coefficient")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a negative coefficient."""
        check_scheduled(self.alpha, "alpha", low=0)


class ShareLoss(Balancer):
    """alpha times the mean over groups of tokens of sum_i f_i P_i; the `Config` has `alpha`.

    A group is what `scope` says: a sequence (the packed window, or each document's part of it where documents are
    kept apart), the micro-batch over all data ranks, or the whole batch of the step.
    """

    needs = frozenset({"learned", "token_choice"})
    scope: Scope = "sequence"

    def __init__(self, config: Any, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.config = config

    @property
    def choices(self) -> int:
        """K: experts that a token chooses."""
        return self.top_k

    def chosen(self, routing: Routing) -> Tensor:
        """T x E, 1 where the token chooses the expert: by the plain affinity, without bias or group limit."""
        top_TK = routing.scores_TE.topk(self.choices, dim=1).indices
        return torch.zeros_like(routing.scores_TE).scatter(1, top_TK, 1.0)

    def value(self, f_NE: Tensor, p_NE: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """The loss of each group, from its f and P."""
        return (f_NE * p_NE).sum(dim=1)

    def observe(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """Sums of each group N: how often each expert is chosen, its share, and the tokens; counts are int64."""
        scores_TE = routing.scores_TE
        groups = self._groups(context)
        valid_T = context.valid().flatten()
        share_TE = scores_TE / (scores_TE.sum(dim=1, keepdim=True) + 1e-20)
        with torch.no_grad():
            chosen_TE = self.chosen(routing).to(torch.int64)
        columns = {
            "chosen_NE": chosen_TE,
            "share_NE": share_TE,
            "tokens_N": torch.ones_like(valid_T, dtype=torch.int64),
        }
        return {name: sum_by_group(column, valid_T, groups) for name, column in columns.items()}

    def count(self, context: SequenceContext) -> Tensor:
        """The number of groups with at least one valid token."""
        valid_T = context.valid().flatten()
        tokens_N = self._groups(context).sums(valid_T.to(torch.int64))
        return (tokens_N > 0).sum()

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        """The sum of the losses of all groups."""
        share_NE = sums["share_NE"]
        tokens_N1 = sums["tokens_N"].clamp(min=1)[:, None].to(share_NE.dtype)
        f_NE = sums["chosen_NE"].to(share_NE.dtype) * (self.experts / self.choices) / tokens_N1
        p_NE = share_NE / tokens_N1
        return self.value(f_NE, p_NE, sums).sum()

    def coefficient(self, progress: Progress) -> float:
        """The coefficient alpha at this position of the run."""
        return value_at(self.config.alpha, progress)

    def _groups(self, context: SequenceContext) -> TokenGroups:
        return token_groups(context, by_sequence=self.scope == "sequence")


class FirstChoiceLoss(ShareLoss):
    """A share loss whose f counts the expert of highest affinity only; `over` names the tokens of a group."""

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """The coefficient, and the tokens over which the loss is formed."""

        over: Literal["sequence", "batch", "micro_batch"] = setting(
            "sequence", doc="the tokens it is formed over"
        )

    def __init__(self, config: Any, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.scope = config.over

    @property
    def choices(self) -> int:
        """1: only the best expert counts."""
        return 1

    def chosen(self, routing: Routing) -> Tensor:
        """T x E, 1 where the expert has the token's highest affinity, the first of equals."""
        best_T1 = routing.scores_TE.argmax(dim=1, keepdim=True)
        return torch.zeros_like(routing.scores_TE).scatter(1, best_T1, 1.0)


def sum_by_group(column: Tensor, valid_T: Tensor, groups: TokenGroups) -> Tensor:
    """The sum of T x ... over the valid tokens of each group, N x ..., in the column's own format."""
    valid = valid_T.view(-1, *[1] * (column.dim() - 1))
    return groups.sums(column * valid.to(column.dtype))


def routed_choices(routing: Routing) -> Tensor:
    """T x E, 1 where the token was routed to the expert, whether or not the assignment was dropped."""
    zeros_TE = torch.zeros_like(routing.scores_TE)
    ones_A = torch.ones_like(routing.expert_A, dtype=zeros_TE.dtype)
    return zeros_TE.index_put((routing.token_A, routing.expert_A), ones_A)
