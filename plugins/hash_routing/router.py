"""Hash layers (arXiv 2106.04426): a fixed table from token ids to experts; nothing is learned, nothing is balanced.

The table is saved with the weights, so a trained model needs neither the seed nor the data that made it.
"""

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import AdjustScores, Router, Routing
from core.contracts.schema import setting
from core.numerics.promotion import at_least_fp32
from core.routing.chance import uniform

_NO_CHOICE = "a token's id alone selects its expert"


class HashRouter(Router):
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

    def __init__(self, config: Config, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.config = config
        self.seed = build.seed
        self.layer = build.layer
        self.token_counts = build.token_counts
        self.known = True
        self.table: Tensor
        self.register_buffer("table", torch.zeros(build.vocabulary, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Fills the random table of this seed and layer, or the balanced one where token counts are known."""
        if self.config.map == "random":
            ids_V = torch.arange(len(self.table))
            drawn_V = uniform(self.seed, f"hash table:{self.layer}", ids_V)
            self.table.copy_((drawn_V * self.experts).to(torch.int64))
            return
        self.known = self.token_counts is not None
        if self.token_counts is not None:
            self.table.copy_(torch.tensor(balanced(self.token_counts().tolist(), self.experts)))

    def _load_from_state_dict(self, *arguments: Any, **rest: Any) -> None:
        super()._load_from_state_dict(*arguments, **rest)  # type: ignore[no-untyped-call]
        self.known = True

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
        if not self.known:
            why = "map = balanced is made from the training data's token counts, and this model was built without data"
            how = "use moeloom.fit, moeloom.load, or moeloom.build(..., token_counts=...)"
            raise UserError(f"hash: {why}: {how}")
        expert_T1 = self.table.index_select(0, context.tokens_BL.flatten())[:, None]
        gate_T1 = at_least_fp32(x_TD.new_ones(len(x_TD), 1))
        scores_TE = gate_T1.new_zeros(len(x_TD), self.experts).scatter(1, expert_T1, 1.0)
        return Routing.top_k(expert_T1, gate_T1, scores_TE, scores_TE)

    def costs(self) -> Costs:
        """No costs: the router has no parameters."""
        return Costs()


def balanced(count_V: list[int], experts: int) -> list[int]:
    """The expert of each id, found greedily: the most frequent id first, each to the expert with the least text so far.

    Among experts with equal text the one with the fewest ids takes it, then the one with the lowest number. So ids that
    the training text does not hold are spread evenly too.
    """
    table = [0] * len(count_V)
    heap = [(0, 0, expert) for expert in range(experts)]
    for token in sorted(range(len(count_V)), key=lambda token: (-count_V[token], token)):
        text, ids, expert = heap[0]
        table[token] = expert
        heapq.heapreplace(heap, (text + count_V[token], ids + 1, expert))
    return table
