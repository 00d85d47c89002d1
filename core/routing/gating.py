"""What learned routers share: a centroid for each expert, products in high precision, selection within groups."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.router import AdjustScores, GroupLimit, Router, Routing
from core.numerics.linear import is_hooked
from core.numerics.promotion import at_least_fp32
from core.routing.affinity import affinities, chosen_gates


class LearnedRouter(Router):
    """A router whose affinities come from the product of a token with each expert's centroid.

    The product and everything after it run in fp32 or wider, also under autocast.
    """

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.config = config
        self.centroids = build.linear(build.dim, experts, "router")

    @property
    def top_k(self) -> int:
        """Experts per token."""
        choices: int = self.config.top_k
        return choices

    def forward(
        self, x_TD: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The routing of the tokens, from logits in fp32 or wider."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE: Tensor = self.centroids(self.read(at_least_fp32(x_TD), context))
            return self.route(logits_TE, adjust_scores, context)

    def read(self, x_TD: Tensor, context: SequenceContext) -> Tensor:
        """The router's input: by default the tokens as they are."""
        return x_TD

    @abstractmethod
    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The routing from every expert's logit for every token."""

    def costs(self) -> Costs:
        """The costs of the centroids."""
        return Costs(active=sum(p.numel() for p in self.parameters()))


class ChosenGateRouter(LearnedRouter):
    """A learned router with K experts for every token, whose gates are the affinities of the chosen experts.

    Its `Config` has `top_k`, `affinity` (`core.routing.affinity.Affinity`), `normalise` and `scale`.
    """

    @abstractmethod
    def choose(
        self, scores_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Tensor:
        """The chosen experts T x K, int64; the scores come without a gradient."""

    @property
    def gate_sum(self) -> float | None:
        """The scale, if gates are normalised."""
        return float(self.config.scale) if self.config.normalise else None

    @property
    def selection_limit(self) -> GroupLimit | None:
        """The limit on the groups that a token reaches; None: it reaches all."""
        return None

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The chosen experts of each token, and their gates."""
        scores_TE = affinities(logits_TE, self.config.affinity)
        expert_TK, gate_TK = self._chosen(scores_TE, adjust_scores, context)
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE, limit=self.selection_limit)

    def choices(
        self, x_TD: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> tuple[Tensor, Tensor] | None:
        """The experts and gates of `forward`, without the lists of a `Routing`."""
        own_route = type(self).route is ChosenGateRouter.route
        if not own_route or is_hooked(self) or torch.is_autocast_enabled(x_TD.device.type):
            return None
        logits_TE = self.centroids(self.read(at_least_fp32(x_TD), context))
        scores_TE = affinities(logits_TE, self.config.affinity)
        return self._chosen(scores_TE, adjust_scores, context)

    def _chosen(
        self, scores_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> tuple[Tensor, Tensor]:
        """The chosen experts T x K, and their gates from the affinities themselves."""
        with torch.no_grad():
            expert_TK = self.choose(scores_TE.detach(), adjust_scores, context)
        config = self.config
        gate_TK = chosen_gates(scores_TE, expert_TK, normalise=config.normalise, scale=config.scale)
        return expert_TK, gate_TK


class TokenGroupRouter(LearnedRouter):
    """A learned router that decides over groups of tokens: its `Config` has `group`, a sequence or a whole batch."""

    @classmethod
    def capabilities_of(cls, config: Any) -> frozenset[str]:
        """The class's capabilities; groups that are whole batches make sequences depend on each other."""
        if config.group == "batch":
            return cls.capabilities | {"batch_dependent"}
        return cls.capabilities


def best_experts(
    scores_TE: Tensor,
    top_k: int,
    *,
    groups: int = 1,
    group_limit: int = 1,
    experts_per_group_score: int = 1,
) -> Tensor:
    """The chosen experts T x K, int64, best first.

    Args:
        scores_TE: scores for selection, biased or not.
        top_k: experts per token.
        groups: equal groups of neighbouring experts.
        group_limit: groups that a token may reach; experts of the others are masked with -inf, never 0.
        experts_per_group_score: how many of a group's best scores are added up to the group's score.
    """
    if group_limit < groups:
        scores_TGX = scores_TE.unflatten(1, (groups, -1))
        group_score_TG = _sum_of_best(scores_TGX, experts_per_group_score)
        reached_TM = group_score_TG.topk(group_limit, dim=1).indices
        masked_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter(1, reached_TM, False)
        scores_TE = scores_TGX.masked_fill(masked_TG[:, :, None], -torch.inf).flatten(1)
    return scores_TE.topk(top_k, dim=1).indices


def shortfall(scores_TE: Tensor, top_k: int, limit: GroupLimit | None = None) -> Tensor:
    """How much each expert's score falls short of being selected, T x E: below 0 where `best_experts` selects it.

    Without a limit on groups it is the difference to the (K+1)-th best score, so it is 0 for the best expert that is
    not selected and for all that tie with it. With a limit an expert also needs its group to be reached, so it is the
    larger of two: the difference to the (K+1)-th best score in the reached groups, and what each expert in the group's
    score would have to gain for the group to be reached (below 0: could lose).

    Args:
        scores_TE: scores for selection.
        top_k: experts per token: less than there are, and with a limit at most those in reach.
        limit: the groups that a token reaches; None: all.
    """
    if limit is None or limit.group_limit >= limit.groups:
        return scores_TE.topk(top_k + 1, dim=1).values[:, -1:] - scores_TE
    scores_TGX = scores_TE.unflatten(1, (limit.groups, -1))
    group_score_TG = _sum_of_best(scores_TGX, limit.experts_per_group_score)
    best_groups = group_score_TG.topk(limit.group_limit + 1, dim=1)
    reached_TM = best_groups.indices[:, :-1]
    reached_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter(1, reached_TM, True)
    best_missed_T1 = best_groups.values[:, -1:]
    worst_reached_T1 = best_groups.values[:, -2:-1]
    rival_TG = torch.where(reached_TG, best_missed_T1, worst_reached_T1)
    of_group_TG = (rival_TG - group_score_TG) / limit.experts_per_group_score
    in_reach_TE = scores_TGX.masked_fill(~reached_TG[:, :, None], -torch.inf).flatten(1)
    cutoff_T1 = in_reach_TE.topk(top_k + 1, dim=1).values[:, -1:]
    size = scores_TGX.shape[2]
    return torch.maximum(cutoff_T1 - scores_TE, of_group_TG.repeat_interleave(size, dim=1))


def _sum_of_best(scores_TGX: Tensor, count: int) -> Tensor:
    """The sum of the best `count` scores of each group, T x G; torch's `topk` is slow on CPUs for the two of V3."""
    if count != 2 or not scores_TGX.is_cpu or scores_TGX.shape[2] < 2:
        return scores_TGX.topk(count, dim=2).values.sum(dim=2)
    best_TG1, place_TG1 = scores_TGX.max(dim=2, keepdim=True)
    second_TG = scores_TGX.scatter(2, place_TG1, -torch.inf).amax(dim=2)
    return best_TG1[:, :, 0] + second_TG
