"""DeepSeek-V3 routing (report, eq. 13-16 and "node-limited routing").

Affinities are sigmoids of the product with each expert's centroid. Selection uses the affinity plus the
balancers' bias; gates use the affinity alone, normalised over the chosen experts and scaled. A token reaches
at most `group_limit` groups: those whose best `group_score` biased affinities have the highest sum.
Experts of other groups are masked with -inf, so that a negative bias can never bring one of them back.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import AdjustScores, GroupLimit, Routing
from core.contracts.schema import setting
from core.numerics.linear import is_hooked
from core.numerics.promotion import at_least_fp32
from core.routing.gating import LearnedRouter, best_experts


class DeepSeekV3Router(LearnedRouter):
    """Sigmoid affinity, bias for selection only, group-limited, normalised gates times a scale."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2"
    capabilities = frozenset({"selects_with_bias", "groups", "causal", "learned", "token_choice"})
    example = {"name": "deepseek_v3", "top_k": 2, "groups": 4, "group_limit": 2, "scale": 2.5}
    rejected_keys = {"capacity_factor": "DeepSeek-V3 drops no token"}

    @dataclass(kw_only=True)
    class Config:
        """Settings of DeepSeek-V3 routing."""

        top_k: int = setting(doc="experts per token (K_r)")
        groups: int = setting(1, doc="groups that the experts are divided into, one per node")
        group_limit: int | None = setting(
            None, doc="groups that one token may reach (M); null: all"
        )
        group_score: int | None = setting(
            None, doc="best affinities that add up to a group's score; null: top_k / group_limit"
        )
        scale: float = setting(1.0, doc="factor on the gates (2.5 in DeepSeek-V3)")
        affinity: Literal["sigmoid", "softmax"] = setting(
            "sigmoid", doc="function from logits to affinities"
        )
        normalise: bool = setting(True, doc="divide the gates by their sum")

        @property
        def reachable_groups(self) -> int:
            """The number of groups that one token may reach."""
            if self.group_limit is None:
                return self.groups
            return self.group_limit

        @property
        def experts_per_group_score(self) -> int:
            """The number of a group's best affinities that are added up to its score."""
            if self.group_score is None:
                return max(1, self.top_k // self.reachable_groups)
            return self.group_score

        @property
        def limit(self) -> GroupLimit:
            """The limit on the groups that a token reaches."""
            return GroupLimit(self.groups, self.reachable_groups, self.experts_per_group_score)

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if the groups do not divide the experts or leave too few to choose from."""
            experts = parent.experts
            if not 0 < self.scale < float("inf"):
                raise ConfigError("scale", "must be more than 0 and finite")
            if self.groups < 1 or experts % self.groups:
                raise ConfigError("groups", f"must divide experts = {experts}")
            if not 1 <= self.reachable_groups <= self.groups:
                raise ConfigError("group_limit", f"must be between 1 and groups = {self.groups}")
            self._check_top_k(experts // self.groups)

        def _check_top_k(self, in_group: int) -> None:
            left = in_group * self.reachable_groups
            least = 2 if self.normalise else 1
            if self.top_k == 1 and self.normalise:
                why = "one gate, normalised, is a constant and has no gradient (normalise: false keeps it as it is)"
                raise ConfigError("top_k", f"must be at least 2: {why}")
            limited = f"{self.reachable_groups} of {self.groups} groups of {in_group}"
            if left < least:
                key = "group_limit" if self.groups > 1 else "top_k"
                why = (
                    f"leaves {left} expert to choose from ({limited}), and two gates are the least"
                )
                how = "fewer groups, a larger group_limit, or normalise: false"
                raise ConfigError(key, f"{why}: give more experts, {how}")
            if not least <= self.top_k <= left:
                why = f"the experts that the group limit leaves ({limited})"
                raise ConfigError("top_k", f"must be between {least} and {left}, {why}")
            self._check_group_score(in_group)

        def _check_group_score(self, in_group: int) -> None:
            if self.reachable_groups == self.groups:
                if self.group_score is not None:
                    need = "must be null unless group_limit is less than groups"
                    raise ConfigError("group_score", f"{need}: groups have no score otherwise")
                return
            if not 1 <= self.experts_per_group_score <= in_group:
                if self.group_score is None:
                    need = "must leave top_k / group_limit experts in every group"
                    raise ConfigError("top_k", need)
                need = f"must be between 1 and {in_group}, the experts of a group"
                raise ConfigError("group_score", need)

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The top_k experts of each token, and their gates (eq. 12-16)."""
        scores_TE = self._affinities(logits_TE)
        expert_TK, gate_TK = self._choose(scores_TE, adjust_scores)
        limit = self.config.limit
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE, limit=limit)

    def choices(
        self, x_TD: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> tuple[Tensor, Tensor] | None:
        """The experts and gates of `forward`, without the lists of a `Routing`."""
        own_route = type(self).route is DeepSeekV3Router.route
        if not own_route or is_hooked(self) or torch.is_autocast_enabled(x_TD.device.type):
            return None
        logits_TE = self.centroids(self.read(at_least_fp32(x_TD), context))
        return self._choose(self._affinities(logits_TE), adjust_scores)

    def _affinities(self, logits_TE: Tensor) -> Tensor:
        """The affinities of tokens to experts (eq. 15)."""
        if self.config.affinity == "sigmoid":
            return logits_TE.sigmoid()
        return logits_TE.softmax(dim=1)

    def _choose(self, scores_TE: Tensor, adjust_scores: AdjustScores) -> tuple[Tensor, Tensor]:
        """The experts T x K with the best adjusted affinities, and their gates from the affinities themselves."""
        with torch.no_grad():
            expert_TK = self.select(adjust_scores(scores_TE.detach()))
        gate_TK = scores_TE.gather(1, expert_TK)
        if self.config.normalise:
            gate_TK = gate_TK / (gate_TK.sum(dim=1, keepdim=True) + 1e-20)
        return expert_TK, gate_TK * self.config.scale

    def select(self, biased_TE: Tensor) -> Tensor:
        """The chosen experts T x K, from biased affinities."""
        return best_experts(biased_TE, self.config.top_k, **self.config.limit._asdict())
