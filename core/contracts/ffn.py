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
from core.contracts.dispatcher import Dispatcher
from core.contracts.layer import LayerExtras
from core.contracts.record import Record


@dataclass(frozen=True)
class RoutingProperties:
    """What a comparison must know about a layer with experts.

    Args:
        expert_parameters: parameters of all routed and shared experts.
        top_k: assignments per token.
        capacity_factor: the most that an expert (or a device) takes in training, over its even share; None: no limit.
        token_choice: whether every token gets `top_k` assignments, dropped or not.
        drops: whether assignments may be dropped in training.
        causal: whether, in training, no token's output depends on the content of a later token (a capacity may depend
            on how many there are).
        batch_dependent: whether a token's output may depend on the other sequences of its micro-batch.
    """

    expert_parameters: int = 0
    top_k: int = 0
    capacity_factor: float | None = None
    token_choice: bool = True
    drops: bool = False
    causal: bool = True
    batch_dependent: bool = False


@dataclass(frozen=True)
class Networks:
    """The SwiGLU networks of a layer, from which the networks of a layer with other experts can be made.

    Tensors are named as in the layer's state dict. A first matrix holds the rows of all gates, then those of all ups.

    Args:
        always: the two matrices [2H, D] and [D, H] that every token passes; None: there are none.
        hidden: H, their inner width; 0 without them.
        routed: the two stacks [E, 2I, D] and [E, D, I] of the routed experts; None: the layer is dense.
        expert_hidden: I, the inner width of a routed expert; 0 without them.
        experts: E, the number of routed experts; 0 for a dense layer.
        by_expert: further tensors with one row or number for each expert: a router's rows, a balancer's biases.
        top_k: experts that a token chooses; 0 for a dense layer.
        gate_sum: the sum of a token's gates if it is the same for every token; None otherwise.
        limit: the clamp of every network's SwiGLU; None: none.
        chooses_by_row: whether experts whose rows in `by_expert` are equal are always chosen together, while their
            number divides `top_k`.
    """

    always: tuple[str, str] | None = None
    hidden: int = 0
    routed: tuple[str, str] | None = None
    expert_hidden: int = 0
    experts: int = 0
    by_expert: tuple[str, ...] = ()
    top_k: int = 0
    gate_sum: float | None = None
    limit: float | None = None
    chooses_by_row: bool = False


class FeedForward(LayerExtras, nn.Module, Component, ABC):
    """Works on the positions of a micro-batch: `(x_BLD, context) -> (y_BLD, record)`.

    `y` is what the block adds to its residual stream. A layer without experts may return None for the record.
    A layer with experts returns one with its load, whose `sums` and `balancer_tallies` line up with `balancers`.
    """

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__()

    @property
    def balancers(self) -> Sequence[Balancer]:
        """The methods that balance this layer; empty for a dense one."""
        return ()

    @property
    def experts(self) -> int:
        """The number of routed experts; 0 for a dense layer."""
        return 0

    @property
    def dispatchers(self) -> Sequence[Dispatcher]:
        """What moves tokens to the experts of this layer; empty for a dense one."""
        return ()

    @property
    def routing_properties(self) -> RoutingProperties | None:
        """What a comparison must know about its routing; None for a dense layer."""
        return None

    @property
    def is_replicated(self) -> bool:
        """Whether it runs on physical experts, since `replicate` was called."""
        return False

    def drop_nothing(self) -> None:
        """Makes the layer carry out every assignment in evaluation mode, from now on; a layer without drops need not.

        `routing_properties` then describes evaluation.
        """

    def networks(self) -> Networks | None:
        """The layer's networks, if `initial_weights` may make more or other experts of them; None: it may not."""
        return None

    def replicate(self, expert_P: Sequence[int], held: range) -> None:
        """Makes the layer run on physical experts, which are copies of its experts; for inference only.

        A choice of an expert goes to one of its copies, by `core.routing.replicas.Replicas`. Outputs stay the same up
        to rounding, and so do all counts by expert. Its record then has the tally `physical_load`, int64 P, and a
        forward in training mode raises `UserError`.

        Args:
            expert_P: the expert that each physical one is a copy of; every expert has one or more.
            held: the physical experts that this rank holds; all of them on one device. The caller binds the
                dispatchers.

        Raises:
            NotImplementedError: the layer cannot, and nothing of it has changed.
        """
        raise NotImplementedError(f"{self.label or type(self).__name__} cannot have replicas")

    @abstractmethod
    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Record | None]:
        """Computes the layer's output and its record; `x_BLD` is the layer's normed input."""

    @abstractmethod
    def costs(self) -> Costs:
        """The costs of one token."""
