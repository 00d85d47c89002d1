"""DeepSeek-V3 routing (report, eq. 13-16 and "node-limited routing").

Affinities are sigmoids of the product with each expert's centroid. Selection uses the affinity plus the
balancers' bias; gates use the affinity alone, normalised over the chosen experts and scaled. A token reaches
at most `group_limit` groups: those whose best top_k / group_limit biased affinities have the highest sum.
Experts of other groups are masked with -inf, so that a negative bias can never bring one of them back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import Wrong
from core.contracts.router import Adjust, Router, Routing
from core.contracts.schema import setting
from core.model.numerics import at_least_fp32


class DeepSeekV3Router(Router):
    """Sigmoid affinity, bias for selection only, group-limited, normalised gates times a scale."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2"
    capabilities = frozenset({"selects_with_bias", "groups", "causal", "learned"})
    example = {"name": "deepseek_v3", "top_k": 2, "groups": 4, "group_limit": 2, "scale": 2.5}

    @dataclass(kw_only=True)
    class Config:
        """Settings of DeepSeek-V3 routing."""

        top_k: int = setting(doc="experts per token (K_r)")
        groups: int = setting(1, doc="groups that the experts are divided into, one per node")
        group_limit: int | None = setting(None, doc="groups that one token may reach (M); null: all")
        scale: float = setting(1.0, doc="factor on the normalised gates (2.5 in DeepSeek-V3)")

        @property
        def reach(self) -> int:
            """Groups that one token may reach."""
            return self.groups if self.group_limit is None else self.group_limit

        def check(self, parent: Any) -> None:
            """Raises `Wrong` where the groups do not divide the experts or leave too few to choose from."""
            experts = parent.experts
            if not 0 < self.scale < float("inf"):
                raise Wrong("scale", "must be positive and finite")
            if self.groups < 1 or experts % self.groups:
                raise Wrong("groups", f"must divide experts = {experts}")
            if not 1 <= self.reach <= self.groups:
                raise Wrong("group_limit", f"must be between 1 and groups = {self.groups}")
            left = experts // self.groups * self.reach
            if self.top_k == 1:
                raise Wrong("top_k", "must be at least 2: one gate, normalised, is a constant and has no gradient")
            if not 2 <= self.top_k <= left:
                why = f"{self.reach} of {self.groups} groups of {experts // self.groups}"
                raise Wrong("top_k", f"must be between 2 and {left}, the experts that the group limit leaves ({why})")
            if self.reach < self.groups and max(1, self.top_k // self.reach) > experts // self.groups:
                raise Wrong("top_k", "must leave top_k / group_limit experts in every group")

    def __init__(self, config: Config, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.config = config
        self.centroids = build.linear(build.dim, experts, "router")

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.config.top_k

    def forward(self, x_TD: Tensor, adjust: Adjust, context: SequenceContext) -> Routing:
        """Choose top_k experts for each token."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.centroids(at_least_fp32(x_TD))
            scores_TE = logits_TE.sigmoid()
            with torch.no_grad():
                expert_TK = self.select(adjust(scores_TE.detach()))
            gate_TK = scores_TE.gather(1, expert_TK)
            gate_TK = gate_TK / (gate_TK.sum(dim=1, keepdim=True) + 1e-20) * self.config.scale
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE)

    def select(self, biased_TE: Tensor) -> Tensor:
        """The chosen experts T x K, from biased affinities."""
        config = self.config
        if config.reach < config.groups:
            per_group_TGX = biased_TE.unflatten(1, (config.groups, -1))
            best = per_group_TGX.topk(max(1, config.top_k // config.reach), dim=2).values.sum(dim=2)
            near_TM = best.topk(config.reach, dim=1).indices
            far_TG = torch.ones_like(best, dtype=torch.bool).scatter(1, near_TM, False)
            biased_TE = per_group_TGX.masked_fill(far_TG[:, :, None], -torch.inf).flatten(1)
        return biased_TE.topk(config.top_k, dim=1).indices

    def costs(self) -> Costs:
        """The centroids."""
        return Costs(active=sum(p.numel() for p in self.parameters()))
