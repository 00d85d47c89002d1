"""The router z-loss (ST-MoE, arXiv 2202.08906, section 3.3): keeps a router's logits small, so that they round well."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.contracts.router import Routing
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting


class ZLoss(Balancer):
    """alpha times the mean over tokens of logsumexp(logits)^2."""

    paper = "ST-MoE (arXiv 2202.08906), section 3.3"
    scope = "token"
    needs = frozenset({"learned"})
    example = {"name": "z_loss", "alpha": 0.001}

    @dataclass(kw_only=True)
    class Config:
        """Settings of the z-loss."""

        alpha: Scheduled = setting(0.001, doc="coefficient (ST-MoE: 0.001)")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a negative coefficient."""
            check_scheduled(self.alpha, "alpha", low=0)

    def __init__(self, config: Config, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.config = config

    def observe(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """The sum of logsumexp(logits)^2 over valid tokens."""
        valid_T = context.valid().flatten()
        squared_T = routing.logits_TE.logsumexp(dim=1).square()
        return {"squared": squared_T.masked_fill(~valid_T, 0).sum()}

    def count(self, context: SequenceContext) -> Tensor:
        """The number of valid tokens."""
        return context.valid().sum()

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        """The sum over tokens, which the step divides by their number."""
        return sums["squared"]

    def coefficient(self, progress: Progress) -> float:
        """The coefficient alpha at this position of the run."""
        return value_at(self.config.alpha, progress)
