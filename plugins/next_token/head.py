"""Next-token prediction: the main loss."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import Wrong
from core.contracts.loss_head import HeadOutput, LossHead, Shared
from core.contracts.schedule import Progress
from core.contracts.schema import setting
from core.model.loss import cross_entropy_sum


class NextToken(LossHead):
    """Mean cross-entropy of the next token over the window's predicted positions."""

    capabilities = frozenset({"next_token"})
    example = {"name": "next_token"}

    @dataclass(kw_only=True)
    class Config:
        """Weight of the main loss."""

        weight: float = setting(1.0, doc="coefficient of the main loss")

        def check(self, parent: Any) -> None:
            """Raises `Wrong` for a negative weight."""
            if not 0 <= self.weight < float("inf"):
                raise Wrong("weight", "must be at least 0 and finite")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.config = config

    def forward(self, hidden_BLD: Tensor, context: SequenceContext, shared: Shared) -> HeadOutput:
        """One term, `next_token`."""
        assert context.targets_BL is not None
        total = cross_entropy_sum(shared.logits, hidden_BLD, context.targets_BL, context.predicted())
        return HeadOutput({"next_token": total})

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        """Predicted positions."""
        return {"next_token": context.predicted().sum()}

    def coefficient(self, progress: Progress) -> float:
        """The weight."""
        return self.config.weight

    def costs(self) -> Costs:
        """Nothing of its own: the output is the main model's."""
        return Costs()
