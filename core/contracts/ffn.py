"""The feed-forward slot."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.component import Component, Costs
from core.contracts.context import SequenceContext
from core.contracts.layer import LayerExtras
from core.contracts.record import Record


@dataclass(frozen=True)
class Traits:
    """What a comparison must know of a layer with experts.

    Args:
        expert_parameters: of all routed and shared experts.
        top_k: assignments per token.
        capacity_factor: what an expert (or a device) takes in training at most, over its even share; None: no limit.
        token_choice: whether every token gets `top_k` assignments, dropped or not.
        drops: whether assignments may be left undone in training.
        causal: whether, in training, no token's output depends on what a later token is (how many there are may set a
            capacity).
        batch_dependent: whether a token's output may depend on the other sequences of its micro-batch.
    """

    expert_parameters: int = 0
    top_k: int = 0
    capacity_factor: float | None = None
    token_choice: bool = True
    drops: bool = False
    causal: bool = True
    batch_dependent: bool = False


class FeedForward(LayerExtras, nn.Module, Component, ABC):
    """Works on each position: `(x_BLD, context) -> (y_BLD, record)`.

    `y` is what the block adds to its residual stream. A layer without experts may return None for the record.
    A layer with experts returns one with its load, whose `sums` and `balancer_tallies` line up with `balancers`.
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

    @property
    def traits(self) -> Traits | None:
        """What a comparison must know of its routing; None for a dense layer."""
        return None

    @abstractmethod
    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Record | None]:
        """`x_BLD` is the normed input of the block."""

    @abstractmethod
    def costs(self) -> Costs:
        """For one token."""
