"""GShard's auxiliary loss (arXiv 2006.16668, algorithm 1 and section 2.2)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.router import Routing
from core.contracts.schedule import Scheduled, check_scheduled
from core.contracts.schema import setting
from core.model.share_loss import ShareLoss, first_choices


class GShardLoss(ShareLoss):
    """(1 / E) sum_e (c_e / S) m_e: first choices c_e and mean probability m_e of a local group of S tokens.

    At an even load this is 1 / E^2, not 1: no coefficient can be carried over from the other losses.
    """

    paper = "GShard (arXiv 2006.16668), algorithm 1"
    example = {"name": "gshard", "alpha": 0.01}

    @dataclass(kw_only=True)
    class Config:
        """Settings of GShard's loss."""

        alpha: Scheduled = setting(doc="coefficient (k); the value at an even load is alpha / experts^2")
        over: Literal["sequence", "batch", "micro_batch"] = setting("sequence", doc="the local group")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` for a negative coefficient."""
            check_scheduled(self.alpha, "alpha", low=0)

    def __init__(self, config: Config, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.scope = config.over

    @property
    def choices(self) -> int:
        """First choices only."""
        return 1

    def chosen(self, routing: Routing) -> Tensor:
        """The highest probability."""
        return first_choices(routing)

    def value(self, f_NE: Tensor, p_NE: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """f is E c / S, so that the sum is E^2 times GShard's."""
        return (f_NE * p_NE).sum(dim=1) / self.experts**2
