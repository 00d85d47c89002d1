"""GShard's auxiliary loss (arXiv 2006.16668, algorithm 1 and section 2.2)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from core.contracts.errors import ConfigError
from core.contracts.schedule import Scheduled
from core.contracts.schema import setting
from core.routing.share_loss import Coefficient, FirstChoiceLoss


class GShardLoss(FirstChoiceLoss):
    """(1 / E) sum_e (c_e / S) m_e: first choices c_e and mean probability m_e of a local group of S tokens.

    At an even load this is 1 / E^2, not 1: no coefficient can be carried over from the other losses.
    """

    paper = "GShard (arXiv 2006.16668), algorithm 1"
    example = {"name": "gshard", "alpha": 0.01}

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """Settings of GShard's loss."""

        alpha: Scheduled = setting(
            doc="coefficient (k); the value at an even load is alpha / experts^2"
        )
        over: Literal["sequence", "batch", "micro_batch"] = setting(
            "sequence", doc="the local group"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a negative coefficient, and for another local group than the router's."""
            super().check(parent)
            group = getattr(getattr(getattr(parent, "router", None), "config", None), "group", None)
            if group is not None and (group == "sequence") != (self.over == "sequence"):
                allowed = "sequence" if group == "sequence" else "micro_batch or batch"
                why = f"the local group that the router has (group: {group})"
                raise ConfigError("over", f"must be {allowed}, {why}")

    def value(self, f_NE: Tensor, p_NE: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """sum_i f_i P_i / E^2 of each group: f is E c / S, so the sum is E^2 times GShard's."""
        return (f_NE * p_NE).sum(dim=1) / self.experts**2
