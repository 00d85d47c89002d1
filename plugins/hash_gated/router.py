"""Routing of DeepSeek-V4's first layers (arXiv 2606.19348, section 2.1): a token's id chooses, the gates are learned.

A fixed table gives each token id its K experts, as in Hash Layers (arXiv 2106.04426). The gates are the affinities of
these experts, computed from the token's state as in the layers that learn which experts to choose.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import AdjustScores
from core.contracts.schema import setting
from core.routing.affinity import Affinity, check_gates_learn, check_scale
from core.routing.gating import ChosenGateRouter
from core.routing.token_table import TokenTableRouter

_NO_CHOICE = "a token's id alone selects its experts, so there is no choice to limit"


class HashGatedRouter(TokenTableRouter, ChosenGateRouter):
    """K experts for each token, looked up by its id; gates are their affinities, normalised, times a scale."""

    paper = "DeepSeek-V4 (arXiv 2606.19348), section 2.1; Hash Layers (arXiv 2106.04426)"
    capabilities = frozenset({"causal", "token_choice"})
    example = {"name": "hash_gated", "top_k": 2, "map": "random", "scale": 1.5}
    rejected_keys = {
        "groups": _NO_CHOICE,
        "group_limit": _NO_CHOICE,
        "group_score": _NO_CHOICE,
        "capacity_factor": "hash routing drops nothing",
    }

    @dataclass(kw_only=True)
    class Config:
        """Settings of hash routing with learned gates."""

        top_k: int = setting(doc="experts per token")
        map: Literal["random", "balanced"] = setting(
            "random", doc="map from ids to experts: drawn, or balanced on the training text"
        )
        affinity: Affinity = setting("sqrt_softplus", doc="function from logits to affinities")
        normalise: bool = setting(True, doc="divide the gates by their sum")
        scale: float = setting(1.0, doc="factor on the gates (1.5 in DeepSeek-V4)")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for more experts than there are, or for gates that cannot learn."""
            check_scale(self.scale)
            check_gates_learn(self.top_k, normalise=self.normalise)
            if not 1 <= self.top_k <= parent.experts:
                raise ConfigError("top_k", f"must be between 1 and experts = {parent.experts}")

    def choose(
        self, scores_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Tensor:
        """The experts T x K of the tokens' ids; neither affinities nor balancers have a say.

        Raises:
            UserError: a balanced table was neither made from data nor loaded.
        """
        return self.looked_up(context)
