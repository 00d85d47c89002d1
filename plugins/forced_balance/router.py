"""A router that takes experts in turn: the perfectly even load under which speed is measured.

It is not a method, and its models are not worth keeping.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import AdjustScores, Routing
from core.contracts.schema import setting
from core.routing.affinity import check_scale, chosen_gates
from core.routing.chance import token_places
from core.routing.gating import LearnedRouter


class ForcedBalanceRouter(LearnedRouter):
    """Assigns to token n of a step the experts n K, n K + 1, ... modulo E; gates are computed as DeepSeek-V3 does."""

    paper = "none; compare the simulated balanced routing of DeepSeek's profile-data"
    capabilities = frozenset({"causal", "token_choice"})
    caveat = (
        "forced_balance assigns experts in turn, whatever the tokens are: its speed is that of a perfectly even load, "
        "and its losses and its load say nothing about any routing method"
    )
    example = {"name": "forced_balance", "top_k": 2}
    rejected_keys = {
        "groups": "experts are assigned in turn, so there is no choice to limit",
        "group_limit": "experts are assigned in turn, so there is no choice to limit",
        "capacity_factor": "the load is even, so no capacity is needed",
    }

    @dataclass(kw_only=True)
    class Config:
        """Settings of the forced load."""

        top_k: int = setting(doc="experts per token")
        scale: float = setting(1.0, doc="factor on the normalised gates")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for more experts than there are."""
            if not 1 <= self.top_k <= parent.experts:
                raise ConfigError("top_k", f"must be between 1 and experts = {parent.experts}")
            check_scale(self.scale)

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The experts in turn, counted from the step's first token."""
        scores_TE = logits_TE.sigmoid()
        sequence_T, position_T = token_places(context)
        number_T = sequence_T * context.tokens_BL.shape[1] + position_T
        choice_K = torch.arange(self.top_k, device=number_T.device)
        expert_TK = (number_T[:, None] * self.top_k + choice_K) % self.experts
        several = self.top_k > 1  # one gate, normalised, would be a constant
        gate_TK = chosen_gates(scores_TE, expert_TK, normalise=several, scale=self.config.scale)
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE)
