"""Switch routing (arXiv 2101.03961, section 2): one expert a token, with a capacity for each expert."""

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
from core.routing.gating import TokenGroupRouter
from core.routing.groups import within_capacity


class SwitchRouter(TokenGroupRouter):
    """The expert of highest probability, and that probability as its gate; earlier tokens have priority."""

    paper = "Switch Transformers (arXiv 2101.03961), section 2"
    capabilities = frozenset({"capacity", "causal", "drops", "learned", "token_choice"})
    caveat = (
        "switch drops assignments beyond an expert's capacity, in evaluation too. Token-by-token decoding drops "
        "nothing, so its results differ."
    )
    example = {"name": "switch", "capacity_factor": 1.25}
    rejected_keys = {
        "top_k": "Switch takes one expert for every token; gshard_dropless takes any number",
        "groups": "Switch takes one expert, so there are no groups of experts to limit; its `group` is of tokens",
        "group_limit": "Switch takes one expert, so there are no groups of experts to limit",
    }

    @dataclass(kw_only=True)
    class Config:
        """Settings of Switch routing."""

        capacity_factor: float = setting(
            1.25, doc="an expert's capacity over its even share S / E of S tokens"
        )
        eval_capacity_factor: float | None = setting(
            None, doc="the same in evaluation; null: as in training"
        )
        jitter: float = setting(
            0.0, doc="e: in training the router's input is multiplied by U(1 - e, 1 + e)"
        )
        group: Literal["sequence", "batch"] = setting(
            "batch", doc="the tokens that share a capacity: a sequence, or a whole batch"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a negative capacity, or jitter outside [0, 1)."""
            for key in ("capacity_factor", "eval_capacity_factor"):
                value = getattr(self, key)
                if value is not None and not 0 <= value < float("inf"):
                    raise ConfigError(key, "must be at least 0 and finite")
            if not 0 <= self.jitter < 1:
                raise ConfigError("jitter", "must be at least 0 and less than 1")

    def __init__(self, config: Config, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.chance = Chance(build.seed, build.layer)

    @classmethod
    def traceable_of(cls, config: Config) -> bool:
        """Whether there is no jitter, which hashes the step and so cannot be part of a graph."""
        return not config.jitter

    @property
    def top_k(self) -> int:
        """1: each token has one expert."""
        return 1

    @property
    def capacity_factor(self) -> float:
        """The capacity of an expert over its even share of the assignments."""
        factor: float = self.config.capacity_factor
        return factor

    def read(self, x_TD: Tensor, context: SequenceContext) -> Tensor:
        """The router's input: the tokens, in training multiplied by jitter."""
        if not (self.training and self.config.jitter):
            return x_TD
        drawn_TD = self.chance.of_tokens(context, "jitter", x_TD.shape[1])
        jitter_TD = 1 + self.config.jitter * (2 * drawn_TD - 1)
        result: Tensor = x_TD * jitter_TD.to(x_TD.dtype)
        return result

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The expert of highest probability, kept if it is within capacity; the first one wins ties."""
        scores_TE = logits_TE.softmax(dim=1)
        with torch.no_grad():
            expert_T1 = scores_TE.argmax(dim=1, keepdim=True)
            by_sequence = self.config.group == "sequence"
            factor = self._factor()
            kept_T1 = within_capacity(
                expert_T1, context, experts=self.experts, by_sequence=by_sequence, factor=factor
            )
        gate_T1 = scores_TE.gather(1, expert_T1)
        return Routing.top_k(expert_T1, gate_T1, scores_TE, logits_TE, kept_T1)

    def _factor(self) -> float:
        """The capacity factor of training, or that of evaluation where it is set."""
        in_evaluation: float | None = self.config.eval_capacity_factor
        if self.training or in_evaluation is None:
            return self.capacity_factor
        return in_evaluation
