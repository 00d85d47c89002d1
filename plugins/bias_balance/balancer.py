"""Auxiliary-loss-free load balancing (arXiv 2408.15664, algorithm 1; report, section 2.1.2), and its variants.

Each expert has a bias that is added to its affinity for selection only. Once per optimizer step, from the
whole batch's integer load, the bias of every expert above the mean falls by `rate` and of every expert below
rises by it. The comparison is made in integers: sign(sum of loads - experts x load) is exact.

Variants (its tables 3 and 4): a change in proportion to the violation instead of its sign, and a bias that
multiplies the affinity instead of being added to it. The paper does not say in what unit a proportional
violation is measured, so `unit` does.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.errors import ConfigError
from core.contracts.record import StepTotals
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting
from core.numerics.exact import ExactState


class Bias(ExactState, Balancer):
    """Updates biases by b_i += rate * sign(mean load - load_i); they are an fp32 buffer, saved with the weights."""

    paper = "Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), algorithm 1"
    needs = frozenset({"selects_with_bias"})
    example = {"name": "bias", "rate": 0.001}

    @dataclass(kw_only=True)
    class Config:
        """Settings of the bias controller."""

        rate: Scheduled = setting(
            0.001, doc="step of the bias (gamma; DeepSeek-V3: 0.001, and 0 from 14.3T tokens on)"
        )
        frozen: bool = setting(False, doc="keep the bias as it is, for a frozen model")
        update: Literal["sign", "proportional"] = setting(
            "sign", doc="rate times the violation's sign, or times itself"
        )
        unit: Literal["relative", "fraction"] = setting(
            "relative",
            doc="unit of a proportional violation mean - load: parts of the mean, or of all assignments",
        )
        form: Literal["additive", "multiplicative"] = setting(
            "additive", doc="affinity + bias from 0, or affinity x bias from 1"
        )
        centre: bool = setting(
            False,
            doc="subtract the mean change from every change, so that the biases keep their mean",
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a negative rate, and for the unit of a sign."""
            check_scheduled(self.rate, "rate", low=0)
            if self.update == "sign" and self.unit != "relative":
                raise ConfigError(
                    "unit", "must be left out unless update is proportional: a sign has no unit"
                )

    def __init__(self, config: Config, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.config = config
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets biases that change no selection: zeros, or ones if they multiply."""
        neutral = 0.0 if self.config.form == "additive" else 1.0
        self.bias.fill_(neutral)

    def adjust_scores(self, scores_TE: Tensor) -> Tensor:
        """The scores for selection, s + b or s b."""
        if self.config.form == "additive":
            return scores_TE + self.bias
        return scores_TE * self.bias

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        """Updates the biases (algorithm 1, lines 3 to 5); an expert at exactly the mean keeps its own."""
        if self.config.frozen:
            return
        load_E = totals.load_E
        assert load_E is not None, "a balancer's layer has experts"
        if load_E.dtype != torch.int64:
            raise TypeError(f"loads are counted in int64, not {load_E.dtype}")
        change_E = self._violation(load_E)
        if self.config.centre:
            change_E = change_E - change_E.mean()
        self.bias += value_at(self.config.rate, progress) * change_E.to(self.bias)

    def _violation(self, load_E: Tensor) -> Tensor:
        """The violation mean - load_i as `update` and `unit` say, fp64; formed in integers, so its sign is exact."""
        total = load_E.sum()
        below_E = total - self.experts * load_E  # E times the violation
        if self.config.update == "sign":
            return below_E.sign().to(torch.float64)
        parts = total if self.config.unit == "relative" else total * self.experts
        return below_E.to(torch.float64) / parts.clamp(min=1)

    def selection_bias(self) -> Tensor:
        """The biases b_E."""
        return self.bias

    def metrics(self) -> dict[str, Tensor]:
        """The largest minus the smallest bias, which shows how much the controller corrects."""
        return {"bias_spread": self.bias.max() - self.bias.min()}
