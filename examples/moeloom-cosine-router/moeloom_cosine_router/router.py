"""Cosine routing: experts by the angle between a token and their centroids, sharpened by a learned temperature."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import AdjustScores, Routing
from core.contracts.schema import setting
from core.numerics.promotion import at_least_fp32
from core.routing.gating import LearnedRouter, best_experts


class CosineRouter(LearnedRouter):
    """sigmoid(temperature x cos(x, e)); the best K, biased for selection only; gates normalised and scaled."""

    paper = "X-MoE (arXiv 2204.09179), section 3.2"
    capabilities = frozenset({"selects_with_bias", "causal", "learned", "token_choice"})
    example = {"name": "cosine", "top_k": 2}
    rejected_keys = {"groups": "cosine lets a token reach every expert"}

    @dataclass(kw_only=True)
    class Config:
        """Settings of cosine routing."""

        top_k: int = setting(doc="experts per token")
        scale: float = setting(1.0, doc="factor on the normalised gates")
        temperature: float = setting(10.0, doc="initial temperature; it is learned")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for what leaves nothing to learn or to choose from."""
            if not 2 <= self.top_k <= parent.experts:
                raise ConfigError(
                    "top_k",
                    f"must be between 2 and experts = {parent.experts}: one normalised gate is 1",
                )
            for key in ("scale", "temperature"):
                if not 0 < getattr(self, key) < math.inf:
                    raise ConfigError(key, "must be more than 0 and finite")

    def __init__(self, config: Config, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.log_temperature = nn.Parameter(
            torch.empty((), dtype=build.precision.param_dtype("router"))
        )

    def reset_parameters(self) -> None:
        """Sets the temperature of the recipe; the centroids are initialised by their own module."""
        nn.init.constant_(self.log_temperature, math.log(self.config.temperature))

    def forward(
        self, x_TD: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """Routes by cosines instead of products, in fp32 or wider."""
        with torch.autocast(x_TD.device.type, enabled=False):
            token_TD = F.normalize(at_least_fp32(x_TD), dim=1)
            centroid_ED = F.normalize(at_least_fp32(self.centroids.weight), dim=1)
            return self.route(
                self.log_temperature.exp() * (token_TD @ centroid_ED.T), adjust_scores, context
            )

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """Chooses experts by affinity and bias, and weighs them by affinity alone."""
        scores_TE = logits_TE.sigmoid()
        with torch.no_grad():
            expert_TK = best_experts(adjust_scores(scores_TE.detach()), self.top_k)
        gate_TK = scores_TE.gather(1, expert_TK)
        gate_TK = gate_TK / (gate_TK.sum(dim=1, keepdim=True) + 1e-20) * self.config.scale
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE)
