"""Next-token prediction: the main loss."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.loss_head import HeadOutput, LossHead, SharedModules
from core.contracts.schedule import Progress
from core.contracts.schema import setting
from core.model.by_source import losses_by_source
from core.model.loss import cross_entropy_sum
from core.numerics.promotion import at_least_fp32


class NextToken(LossHead):
    """Mean cross-entropy of the next token over the window's predicted positions."""

    capabilities = frozenset({"next_token"})
    reads_embedding = False
    example = {"name": "next_token"}

    @dataclass(kw_only=True)
    class Config:
        """Settings of the main loss."""

        weight: float = setting(1.0, doc="coefficient of the main loss")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a negative weight."""
            if not 0 <= self.weight < float("inf"):
                raise ConfigError("weight", "must be at least 0 and finite")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.config = config

    def forward(
        self, hidden_BLD: Tensor, context: SequenceContext, shared: SharedModules
    ) -> HeadOutput:
        """The term `next_token`: the sum of the cross-entropies of predicted positions; of a mixture by source too."""
        assert context.targets_BL is not None
        counted_BL = context.predicted()
        logits = shared.logits
        targets_BL = context.targets_BL
        if not context.source_names:
            return HeadOutput(
                {"next_token": cross_entropy_sum(logits, hidden_BLD, targets_BL, counted_BL)}
            )
        losses_T = at_least_fp32(hidden_BLD.new_zeros(targets_BL.numel()))
        total = cross_entropy_sum(logits, hidden_BLD, targets_BL, counted_BL, losses_T)
        metrics = losses_by_source(context, losses_T, counted_BL)
        return HeadOutput({"next_token": total}, metrics=metrics)

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        """The number of predicted positions."""
        return {"next_token": context.predicted().sum()}

    def coefficient(self, progress: Progress) -> float:
        """The coefficient of the loss: the weight, constant over the run."""
        return self.config.weight

    def costs(self) -> Costs:
        """No costs of its own: the output is the main model's."""
        return Costs()
