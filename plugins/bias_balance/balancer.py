"""Auxiliary-loss-free load balancing (arXiv 2408.15664, algorithm 1; report, section 2.1.2).

Each expert has a bias that is added to its affinity for selection only. Once per optimizer step, from the
whole batch's integer load, the bias of every expert above the mean falls by `rate` and of every expert below
rises by it. The comparison is made in integers: sign(sum of loads - experts x load) is exact.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting
from core.model.exact import ExactState


class Bias(ExactState, Balancer):
    """b_i += rate * sign(mean load - load_i). The bias is an fp32 buffer, saved with the weights."""

    paper = "Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), algorithm 1"
    needs = frozenset({"selects_with_bias"})
    example = {"name": "bias", "rate": 0.001}

    @dataclass(kw_only=True)
    class Config:
        """Settings of the bias controller."""

        rate: Scheduled = setting(0.001, doc="step of the bias (gamma; DeepSeek-V3: 0.001, and 0 from 14.3T tokens on)")
        frozen: bool = setting(False, doc="keep the bias as it is, for a frozen model")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` for a negative rate."""
            check_scheduled(self.rate, "rate", low=0)

    def __init__(self, config: Config, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.config = config
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Zeros."""
        self.bias.zero_()

    def adjust(self, scores_TE: Tensor) -> Tensor:
        """s + b."""
        return scores_TE + self.bias

    def on_step_end(self, load_E: Tensor, progress: Progress) -> None:
        """Algorithm 1, lines 3 to 5; an expert at exactly the mean keeps its bias."""
        if self.config.frozen:
            return
        if load_E.dtype != torch.int64:
            raise TypeError(f"loads are counted in int64, not {load_E.dtype}")
        direction_E = (load_E.sum() - self.experts * load_E).sign()
        self.bias += value_at(self.config.rate, progress) * direction_E.to(self.bias)

    def selection_bias(self) -> Tensor:
        """b_E."""
        return self.bias

    def metrics(self) -> dict[str, Tensor]:
        """The spread of the biases: how hard the controller works."""
        return {"bias_spread": self.bias.max() - self.bias.min()}
