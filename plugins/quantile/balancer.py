"""Quantile Balancing (Kimi K3 technical report, section 2.3.3, eq. 13 and 14, appendix D).

A token selects an expert if its affinity plus the expert's bias exceeds the token's cutoff: the best biased affinity
that it did not select, its (k+1)-th. So `cutoff - affinity` is the bias that the expert would need for this token. Over
the tokens of a step, the k/E quantile of the needed biases is the bias with which k/E of them, an even share,
select the expert. Each step replaces the bias by this quantile, read from a histogram of integers that is added up over
micro-batches and data ranks. The biases are then centred, which changes no selection. Where a token reaches only some
groups of experts, an expert also needs its group to be reached (`core.routing.gating.shortfall`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.record import StepTotals
from core.contracts.router import Routing
from core.contracts.schedule import Progress, Scheduled, check_scheduled, value_at
from core.contracts.schema import setting
from core.numerics.exact import ExactState
from core.routing.gating import shortfall
from plugins.quantile.histogram import Bins

MOST_BINS = 65536
"""The most bins: an affinity in fp32 does not tell many more apart."""

MOST_SPAN = 1e6
"""The largest span: a step can move a bias by about as much, and a larger bias would drown affinities in fp32."""


class QuantileBalance(ExactState, Balancer):
    """Sets each bias to the k/E quantile of the biases that the step's tokens needed; an fp32 buffer."""

    paper = "Kimi K3 technical report, section 2.3.3 and appendix D"
    needs = frozenset({"selects_with_bias", "token_choice"})
    example = {"name": "quantile", "bins": 1000}

    @dataclass(kw_only=True)
    class Config:
        """Settings of Quantile Balancing."""

        bins: int = setting(1000, doc="bins of each expert's histogram (Kimi K3: 1000)")
        span: float = setting(
            1.0,
            doc="how far the bins reach below the smallest and above the largest bias: the range of "
            "an affinity, 1 for sigmoid and softmax",
        )
        ema: Scheduled = setting(
            0.0,
            doc="part of the old bias that an update keeps; 0: the quantile replaces it (Kimi K3), 1: no update",
        )
        frozen: bool = setting(
            False, doc="keep the bias as it is and count nothing, for a frozen model"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for values out of range, and if every token uses every expert."""
            if not 2 <= self.bins <= MOST_BINS:
                raise ConfigError("bins", f"must be between 2 and {MOST_BINS}")
            if not 0 < self.span <= MOST_SPAN:
                raise ConfigError("span", f"must be more than 0 and at most {MOST_SPAN:,.0f}")
            check_scheduled(self.ema, "ema", low=0, high=1)
            top_k = getattr(parent.router.config, "top_k", 0)
            if top_k >= parent.experts:
                uses = f"every token uses all {parent.experts} experts (top_k = {top_k})"
                raise ConfigError("name", f"must be another balancer: {uses}")

    def __init__(self, config: Config, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.config = config
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets biases that change no selection."""
        self.bias.zero_()

    def adjust_scores(self, scores_TE: Tensor) -> Tensor:
        """The scores for selection, s + b."""
        return scores_TE + self.bias

    @torch.no_grad()
    def tally(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        """The histogram of the biases that each expert needed, E x B, over the valid tokens of a micro-batch."""
        if self.config.frozen:
            return {}
        selected_by_TE = self.adjust_scores(routing.scores_TE)
        needed_TE = self.bias + shortfall(selected_by_TE, self.top_k, routing.limit)
        return {"needed_EB": self._bins().histogram(needed_TE, context.valid().flatten())}

    @torch.no_grad()
    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        """Sets the biases (eq. 13 and 14); a step without any valid token leaves them as they are."""
        if self.config.frozen:
            return
        histogram_EB = totals.tallies["needed_EB"]
        if histogram_EB.dtype != torch.int64:
            raise TypeError(f"histograms are counted in int64, not {histogram_EB.dtype}")
        solved_E = self._bins().quantile(histogram_EB, self.top_k, self.experts)
        solved_E = solved_E - solved_E.mean()
        kept = value_at(self.config.ema, progress)
        updated_E = kept * self.bias.double() + (1.0 - kept) * solved_E
        counted_E = histogram_EB.sum(dim=1) > 0
        self.bias.copy_(torch.where(counted_E, updated_E.to(self.bias), self.bias))

    def _bins(self) -> Bins:
        """The bins of this step: they depend on the bias alone, so every micro-batch and rank has the same."""
        return Bins.around(self.bias, self.config.span, self.config.bins)

    def selection_bias(self) -> Tensor:
        """The biases b_E."""
        return self.bias

    def metrics(self) -> dict[str, Tensor]:
        """The largest minus the smallest bias, which shows how much the controller corrects."""
        return {"bias_spread": self.bias.max() - self.bias.min()}
