"""The Switch Transformer's balance loss (arXiv 2101.03961, eq. 4-6)."""

from dataclasses import dataclass
from typing import Literal

from core.contracts.schedule import Scheduled
from core.contracts.schema import setting
from core.routing.share_loss import Coefficient, FirstChoiceLoss


class SwitchLoss(FirstChoiceLoss):
    """alpha N sum_i f_i P_i: the fraction of tokens whose best expert is i, times its mean probability."""

    paper = "Switch Transformers (arXiv 2101.03961), eq. 4-6"
    example = {"name": "switch", "alpha": 0.01}

    @dataclass(kw_only=True)
    class Config(Coefficient):
        """Settings of Switch's loss."""

        alpha: Scheduled = setting(
            0.01, doc="coefficient, and the value at an even load (Switch: 0.01)"
        )
        over: Literal["sequence", "batch", "micro_batch"] = setting(
            "micro_batch", doc="the tokens over which the loss is formed"
        )
