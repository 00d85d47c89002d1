"""DeepSeek-V3 routing (report, eq. 13-16 and "node-limited routing").

Affinities are sigmoids of the product with each expert's centroid, or what `affinity` names instead. Selection
uses the affinity plus the balancers' bias; gates use the affinity alone, normalised over the chosen experts and
scaled. A token reaches at most `group_limit` groups: those whose best `group_score` biased affinities have the
highest sum.
Experts of other groups are masked with -inf, so that a negative bias can never bring one of them back.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import AdjustScores, GroupLimit
from core.contracts.schema import setting
from core.routing.affinity import Affinity, check_gates_learn, check_scale
from core.routing.gating import ChosenGateRouter, best_experts


class DeepSeekV3Router(ChosenGateRouter):
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
        affinity: Affinity = setting(
            "sigmoid", doc="function from logits to affinities (DeepSeek-V4: sqrt_softplus)"
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
            check_scale(self.scale)
            if self.groups < 1 or experts % self.groups:
                raise ConfigError("groups", f"must divide experts = {experts}")
            if not 1 <= self.reachable_groups <= self.groups:
                raise ConfigError("group_limit", f"must be between 1 and groups = {self.groups}")
            self._check_top_k(experts // self.groups)

        def _check_top_k(self, in_group: int) -> None:
            left = in_group * self.reachable_groups
            least = 2 if self.normalise else 1
            check_gates_learn(self.top_k, normalise=self.normalise)
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

    @property
    def selection_limit(self) -> GroupLimit:
        """The limit on the groups that a token reaches."""
        limit: GroupLimit = self.config.limit
        return limit

    def choose(
        self, scores_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Tensor:
        """The experts T x K with the best adjusted affinities (eq. 16)."""
        return self.select(adjust_scores(scores_TE))

    def select(self, biased_TE: Tensor) -> Tensor:
        """The chosen experts T x K, from biased affinities."""
        return best_experts(biased_TE, self.config.top_k, **self.selection_limit._asdict())
