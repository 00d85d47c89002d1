"""DeepSeek-V2 routing (arXiv 2405.04434, eq. 20-22 and section 2.2.2): softmax affinity, device-limited."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import AdjustScores, GroupLimit, Routing
from core.contracts.schema import setting
from core.routing.gating import LearnedRouter, best_experts


class DeepSeekV2Router(LearnedRouter):
    """The K best experts on the M devices that hold the best single experts; gates are the probabilities times a scale.

    Experts of other devices are masked with -inf. Selection goes through the balancers, so that a bias can be compared
    under a softmax too, as arXiv 2408.15664 does; without one this is the paper's routing.
    """

    paper = "DeepSeek-V2 (arXiv 2405.04434), eq. 20-22 and section 2.2.2"
    capabilities = frozenset({"selects_with_bias", "groups", "causal", "learned", "token_choice"})
    example = {"name": "deepseek_v2", "top_k": 2, "groups": 4, "group_limit": 2, "scale": 1.0}
    rejected_keys = {
        "capacity_factor": "DeepSeek-V2 limits devices, not experts: that is the layer's token_dropping"
    }

    @dataclass(kw_only=True)
    class Config:
        """Settings of DeepSeek-V2 routing."""

        top_k: int = setting(doc="experts per token (K_r)")
        groups: int = setting(1, doc="devices that the experts are divided over (D)")
        group_limit: int | None = setting(
            None, doc="devices that one token may reach (M); null: all"
        )
        scale: float = setting(
            1.0, doc="factor on the gates (released configurations: 16 in V2, 1 in V2-Lite)"
        )

        @property
        def reachable_groups(self) -> int:
            """The number of devices that one token may reach."""
            if self.group_limit is None:
                return self.groups
            return self.group_limit

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if the devices do not divide the experts or leave too few to choose from."""
            experts = parent.experts
            if self.groups < 1 or experts % self.groups:
                raise ConfigError("groups", f"must divide experts = {experts}")
            if not 1 <= self.reachable_groups <= self.groups:
                raise ConfigError("group_limit", f"must be between 1 and groups = {self.groups}")
            left = experts // self.groups * self.reachable_groups
            if not 1 <= self.top_k <= left:
                why = "the experts that the group limit leaves"
                raise ConfigError("top_k", f"must be between 1 and {left}, {why}")
            if not 0 < self.scale < float("inf"):
                raise ConfigError("scale", "must be more than 0 and finite")

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The M devices of the best single experts, then the K best experts on them (eq. 20-22)."""
        scores_TE = logits_TE.softmax(dim=1)
        with torch.no_grad():
            adjusted_TE = adjust_scores(scores_TE.detach())
            limit = GroupLimit(self.config.groups, self.config.reachable_groups)
            expert_TK = best_experts(adjusted_TE, self.top_k, **limit._asdict())
        gate_TK = scores_TE.gather(1, expert_TK) * self.config.scale
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE, limit=limit)
