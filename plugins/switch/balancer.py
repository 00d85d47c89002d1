"""The Switch Transformer's balance loss (arXiv 2101.03961, eq. 4-6)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.router import Routing
from core.contracts.schedule import Scheduled, check_scheduled
from core.contracts.schema import setting
from core.model.share_loss import ShareLoss, first_choices


class SwitchLoss(ShareLoss):
    """alpha N sum_i f_i P_i: the fraction of tokens whose best expert is i, times its mean probability."""

    paper = "Switch Transformers (arXiv 2101.03961), eq. 4-6"
    example = {"name": "switch", "alpha": 0.01}

    @dataclass(kw_only=True)
    class Config:
        """Settings of Switch's loss."""

        alpha: Scheduled = setting(0.01, doc="coefficient, and the value at an even load (Switch: 0.01)")
        over: Literal["sequence", "batch", "micro_batch"] = setting("micro_batch", doc="the tokens it is formed over")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` for a negative coefficient."""
            check_scheduled(self.alpha, "alpha", low=0)

    def __init__(self, config: Config, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.scope = config.over

    @property
    def choices(self) -> int:
        """The best expert only."""
        return 1

    def chosen(self, routing: Routing) -> Tensor:
        """The highest probability."""
        return first_choices(routing)
