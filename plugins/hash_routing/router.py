"""Hash layers (arXiv 2106.04426): a fixed table from token ids to experts; nothing is learned, nothing is balanced.

The table is saved with the weights, so a trained model needs neither the seed nor the data that made it.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.router import AdjustScores, Routing
from core.contracts.schema import setting
from core.numerics.promotion import at_least_fp32
from core.routing.token_table import TokenTableRouter

_NO_CHOICE = "a token's id alone selects its expert"


class HashRouter(TokenTableRouter):
    """One expert for each token, looked up by its id; the gate is 1."""

    paper = "Hash Layers For Large Sparse Models (arXiv 2106.04426)"
    capabilities = frozenset({"causal", "token_choice"})
    example = {"name": "hash", "map": "random"}
    rejected_keys = {
        "top_k": "a token's id selects exactly one expert",
        "groups": f"{_NO_CHOICE}, so there is no choice to limit",
        "group_limit": f"{_NO_CHOICE}, so there is no choice to limit",
        "capacity_factor": "hash routing drops nothing",
        "scale": "the gate is 1; there is no affinity to scale",
    }

    @dataclass(kw_only=True)
    class Config:
        """Settings of hash routing."""

        map: Literal["random", "balanced"] = setting(
            "random", doc="map from ids to experts: drawn, or balanced on the training text"
        )

    @property
    def top_k(self) -> int:
        """1: each token has one expert."""
        return 1

    def forward(
        self, x_TD: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The routing of the tokens by their ids.

        Raises:
            UserError: a balanced table was neither made from data nor loaded.
        """
        expert_T1 = self.looked_up(context)
        gate_T1 = at_least_fp32(x_TD.new_ones(len(x_TD), 1))
        scores_TE = gate_T1.new_zeros(len(x_TD), self.experts).scatter(1, expert_T1, 1.0)
        return Routing.top_k(expert_T1, gate_T1, scores_TE, scores_TE)

    def costs(self) -> Costs:
        """No costs: the router has no parameters."""
        return Costs()
