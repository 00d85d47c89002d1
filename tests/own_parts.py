"""Components that use records: layers with a loss, a tally and metrics of their own, and a balancer with a tally.

`plugins: [own_parts]` registers them. Each keeps the totals that it was handed at the end of every step.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from core.contracts.attention import Cache
from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.context import SequenceContext
from core.contracts.layer import LayerExtras
from core.contracts.record import MaxMetric, MeanMetric, Record, StepTotals
from core.contracts.router import Routing
from core.contracts.schedule import Progress
from core.contracts.schema import setting
from core.extension.hookspec import hookimpl
from plugins.multi_head.attention import MultiHeadAttention
from plugins.swiglu.ffn import SwiGLU

CONTRACTS = "2.0"
RESIDUES = 4
BINS = 16


@hookimpl
def register(registry: Any) -> None:
    """Registers all components of this module."""
    registry.attention("watched", "own_parts:WatchedAttention")
    registry.ffn("watched", "own_parts:WatchedDense")
    registry.balancer("histogram", "own_parts:Histogram")


class Watched(LayerExtras):
    """A layer with a loss that keeps its output small, with metrics, and with a tally of token ids by residue."""

    def start_watching(self, alpha: float) -> None:
        """Sets up the loss and the counters; the part of `__init__` that all watched layers share."""
        self.alpha = alpha
        self.ended: list[tuple[StepTotals, Progress]] = []
        self.residues_R: Tensor
        self.register_buffer("residues_R", torch.zeros(RESIDUES, dtype=torch.int64))

    def reset_parameters(self) -> None:
        self.residues_R.zero_()

    def record(self, y_BLD: Tensor, context: SequenceContext) -> Record:
        """The record of an output: its loss, its tally and its metrics."""
        valid_BL = context.valid()
        squares_BL = y_BLD.square().mean(dim=-1).masked_fill(~valid_BL, 0)
        sizes_BL = y_BLD.detach().abs().amax(dim=-1).masked_fill(~valid_BL, 0)
        residues_BLR = F.one_hot(context.tokens_BL % RESIDUES, RESIDUES) * valid_BL[:, :, None]
        return Record(
            terms={"energy": squares_BL.sum()},
            tallies={"residues": residues_BLR.sum(dim=(0, 1))},
            metrics={
                "size": MeanMetric(sizes_BL.sum(), valid_BL.sum()),
                "largest": MaxMetric(sizes_BL.max()),
            },
        )

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        return {"energy": context.valid().sum()}

    def coefficient(self, progress: Progress) -> float:
        return self.alpha

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        self.residues_R += totals.tallies["residues"]
        self.ended.append((totals, progress))


class WatchedAttention(Watched, MultiHeadAttention):
    """Multi-head attention that returns a record."""

    example = {"name": "watched", "heads": 4}

    @dataclass(kw_only=True)
    class Config(MultiHeadAttention.Config):
        """The settings of multi-head attention, and the coefficient of the loss."""

        alpha: float = setting(0.5, doc="coefficient of the loss")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.start_watching(config.alpha)

    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> tuple[Tensor, Record]:
        y_BLD = super().forward(x_BLD, context, cache)
        return y_BLD, self.record(y_BLD, context)


class WatchedDense(Watched, SwiGLU):
    """A dense layer that returns a record."""

    example = {"name": "watched", "hidden": 64}

    @dataclass(kw_only=True)
    class Config(SwiGLU.Config):
        """The settings of a dense layer, and the coefficient of the loss."""

        alpha: float = setting(0.25, doc="coefficient of the loss")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.start_watching(config.alpha)

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Record]:
        y_BLD, _ = super().forward(x_BLD, context)
        return y_BLD, self.record(y_BLD, context)


class Histogram(Balancer):
    """Counts valid tokens' affinities in bins of equal width, over all steps; it balances nothing."""

    example = {"name": "histogram"}

    @dataclass(kw_only=True)
    class Config:
        """The format of the tally; only int64 is allowed, the others are for tests of the error."""

        dtype: Literal["int64", "int32", "float64"] = setting("int64", doc="format of the counts")

    def __init__(self, config: Config, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.ended: list[tuple[StepTotals, Progress]] = []
        self.counted_EN: Tensor
        self.register_buffer("counted_EN", torch.zeros(experts, BINS, dtype=torch.int64))

    def reset_parameters(self) -> None:
        self.counted_EN.zero_()

    def tally(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        bin_TE = (routing.scores_TE.detach() * BINS).long().clamp(0, BINS - 1)
        counted_TEN = F.one_hot(bin_TE, BINS) * context.valid().flatten()[:, None, None]
        return {"affinities_EN": counted_TEN.sum(dim=0).to(self.dtype)}

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        self.counted_EN += totals.tallies["affinities_EN"]
        self.ended.append((totals, progress))
