"""GShard's top-2 gating (arXiv 2006.16668, algorithm 1), and the same without capacity or chance."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import AdjustScores, Routing
from core.contracts.schema import setting
from core.routing.chance import Chance
from core.routing.gating import LearnedRouter, TokenGroupRouter, best_experts
from core.routing.groups import within_capacity


class GShardRouter(TokenGroupRouter):
    """Two experts a token, each with a capacity; the second one is kept by chance.

    Within a local group all first choices are placed before any second choice, in token order. An expert's counter
    grows even if its capacity is used up, and even if chance drops the second choice. Gates are normalised over the
    two before anything is dropped; a dropped token passes through the residual connection alone.
    """

    paper = "GShard (arXiv 2006.16668), algorithm 1"
    capabilities = frozenset({"capacity", "drops", "learned", "token_choice"})
    caveat = (
        "gshard drops assignments beyond an expert's capacity, in evaluation too, and is not causal: first choices of "
        "later tokens are placed before second choices. Token-by-token decoding drops nothing, so its results differ."
    )
    example = {"name": "gshard", "capacity_factor": 1.0}
    rejected_keys = {
        "top_k": "GShard's algorithm takes two experts for every token; gshard_dropless takes any number",
        "groups": "GShard limits what an expert takes, not which experts a token reaches; its `group` is of tokens",
        "group_limit": "GShard limits what an expert takes, not which experts a token reaches",
    }

    @dataclass(kw_only=True)
    class Config:
        """Settings of GShard's gating."""

        capacity_factor: float = setting(
            1.0, doc="an expert's capacity over its even share 2 S / E of S tokens"
        )
        group: Literal["sequence", "batch"] = setting(
            "sequence", doc="local group: each sequence, or a whole batch"
        )
        second: Literal["random", "always"] = setting(
            "random", doc="whether the second expert is kept by chance, or always"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a negative capacity, or if there are no two experts."""
            if not 0 <= self.capacity_factor < float("inf"):
                raise ConfigError("capacity_factor", "must be at least 0 and finite")
            if parent.experts < 2:
                why = "gshard chooses two experts for every token, and the layer has one"
                raise ConfigError("", why)

    def __init__(self, config: Config, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.chance = Chance(build.seed, build.layer)

    @classmethod
    def traceable_of(cls, config: Config) -> bool:
        """Whether no second expert is drawn: the draw hashes the step and so cannot be part of a graph."""
        return config.second == "always"

    @property
    def top_k(self) -> int:
        """2: each token has two experts."""
        return 2

    @property
    def capacity_factor(self) -> float:
        """The capacity of an expert over its even share of the assignments."""
        factor: float = self.config.capacity_factor
        return factor

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The routing of algorithm 1, all groups at once."""
        scores_TE = logits_TE.softmax(dim=1)
        with torch.no_grad():
            first_T1 = scores_TE.argmax(dim=1, keepdim=True)
            second_T1 = scores_TE.scatter(1, first_T1, -torch.inf).argmax(dim=1, keepdim=True)
            expert_TK = torch.cat([first_T1, second_T1], dim=1)
        gate_TK = scores_TE.gather(1, expert_TK)
        gate_TK = gate_TK / (gate_TK.sum(dim=1, keepdim=True) + 1e-20)
        with torch.no_grad():
            by_sequence = self.config.group == "sequence"
            factor = self.config.capacity_factor
            kept_TK = within_capacity(
                expert_TK, context, experts=self.experts, by_sequence=by_sequence, factor=factor
            )
            if self.config.second == "random":
                drawn_T = self.chance.of_tokens(context, "second expert")
                first_T = torch.ones_like(drawn_T) > 0
                second_T = 2 * gate_TK[:, 1] > drawn_T
                kept_TK = kept_TK & torch.stack([first_T, second_T], dim=1)
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE, kept_TK)


class DroplessRouter(LearnedRouter):
    """The K experts of highest probability, nothing dropped: the "GShard" that DeepSeekMoE compares itself with."""

    paper = "DeepSeekMoE (arXiv 2401.06066), eq. 3-5 and section 4.1.2"
    capabilities = frozenset({"causal", "learned", "token_choice"})
    example = {"name": "gshard_dropless", "top_k": 2}
    rejected_keys = {
        "capacity_factor": "gshard_dropless drops nothing; gshard has a capacity",
        "groups": "gshard_dropless lets a token reach every expert",
        "group_limit": "gshard_dropless lets a token reach every expert",
    }

    @dataclass(kw_only=True)
    class Config:
        """Settings of top-k gating without capacity."""

        top_k: int = setting(2, doc="experts per token")
        normalise: bool = setting(False, doc="divide the gates by their sum, as GShard does")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for more experts than there are, and for one gate that is always 1."""
            if not 1 <= self.top_k <= parent.experts:
                raise ConfigError("top_k", f"must be between 1 and experts = {parent.experts}")
            if self.normalise and self.top_k == 1:
                raise ConfigError(
                    "normalise", "must be false for top_k = 1: one gate, normalised, is a constant"
                )

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The K experts of highest probability, with their probabilities as gates."""
        scores_TE = logits_TE.softmax(dim=1)
        with torch.no_grad():
            expert_TK = best_experts(scores_TE, self.top_k)
        gate_TK = scores_TE.gather(1, expert_TK)
        if self.config.normalise:
            gate_TK = gate_TK / (gate_TK.sum(dim=1, keepdim=True) + 1e-20)
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE)
