"""What learned routers share: a centroid for each expert, products in high precision, selection within groups."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.router import Adjust, Router, Routing
from core.numerics.promotion import at_least_fp32


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

    def forward(self, x_TD: Tensor, adjust: Adjust, context: SequenceContext) -> Routing:
        """The routing of these tokens."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE: Tensor = self.centroids(self.read(at_least_fp32(x_TD), context))
            return self.route(logits_TE, adjust, context)

    def read(self, x_TD: Tensor, context: SequenceContext) -> Tensor:
        """What the router looks at: the tokens as they are."""
        return x_TD

    @abstractmethod
    def route(self, logits_TE: Tensor, adjust: Adjust, context: SequenceContext) -> Routing:
        """The routing from every expert's logit for every token."""

    def costs(self) -> Costs:
        """The centroids."""
        return Costs(active=sum(p.numel() for p in self.parameters()))


class TokenGroupRouter(LearnedRouter):
    """A learned router that decides over groups of tokens: its `Config` has `group`, a sequence or a whole batch."""

    @classmethod
    def capabilities_of(cls, config: Any) -> frozenset[str]:
        """Groups that are whole batches make sequences depend on each other."""
        return cls.capabilities | ({"batch_dependent"} if config.group == "batch" else set())


def best_experts(scores_TE: Tensor, top_k: int, *, groups: int = 1, reach: int = 1, spokesmen: int = 1) -> Tensor:
    """The chosen experts T x K, int64, best first.

    Args:
        scores_TE: for selection, biased or not.
        top_k: experts per token.
        groups: equal groups of neighbouring experts.
        reach: groups that a token may reach; experts of the others are masked with -inf, never 0.
        spokesmen: how many of a group's best scores are added up to its strength.
    """
    if reach < groups:
        per_group_TGX = scores_TE.unflatten(1, (groups, -1))
        strength_TG = per_group_TGX.topk(spokesmen, dim=2).values.sum(dim=2)
        near_TM = strength_TG.topk(reach, dim=1).indices
        far_TG = torch.ones_like(strength_TG, dtype=torch.bool).scatter(1, near_TM, False)
        scores_TE = per_group_TGX.masked_fill(far_TG[:, :, None], -torch.inf).flatten(1)
    return scores_TE.topk(top_k, dim=1).indices
