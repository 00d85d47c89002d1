"""The feed-forward slot."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.record import Record


class FeedForward(nn.Module, Component, ABC):
    """Works on each position: `(x_BLD, context) -> (y_BLD, record)`.

    `y` is what the block adds to its residual stream. A layer without experts returns None for the record.
    A layer with experts returns one whose `sums` line up with `balancers`.
    """

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__()

    @property
    def balancers(self) -> Sequence[Balancer]:
        """The methods that balance this layer; none for a dense one."""
        return ()

    @property
    def experts(self) -> int:
        """Routed experts; 0 for a dense layer."""
        return 0

    @abstractmethod
    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Record | None]:
        """`x_BLD` is the normed input of the block."""

    @abstractmethod
    def costs(self) -> Costs:
        """For one token."""
