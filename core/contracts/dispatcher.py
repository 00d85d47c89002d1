"""The dispatcher slot: how tokens travel to their experts and back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Component
from core.contracts.router import Routing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Placement:
    """Which ranks hold the weights of which experts.

    Args:
        experts_RS: the experts of each rank, by their number in the layer, in the order of the rank's weights.
        ranks_per_node: how many ranks, one after the other, are on one machine.
    """

    experts_RS: tuple[tuple[int, ...], ...]
    ranks_per_node: int

    @classmethod
    def even(cls, experts: int, ranks: int, ranks_per_node: int) -> "Placement":
        """Places equally many experts on each rank, in order; `ranks` must divide `experts`."""
        share = experts // ranks
        rows = tuple(tuple(range(r * share, (r + 1) * share)) for r in range(ranks))
        return cls(rows, ranks_per_node)


class Handle(ABC):
    """A transfer that is under way; other work may be done between `start` and `wait`."""

    @abstractmethod
    def wait(self) -> Any:
        """Waits for the transfer and returns what was transferred."""


class Dispatcher(Component, ABC):
    """Moves tokens to experts and the experts' outputs back, in two transfers that may overlap other work.

    It owns no parameter. A dropped assignment adds nothing to its token's output.

    `capabilities` are `between_ranks` (it can be bound to several ranks) and `replaceable` (a strategy that divides
    experts may put its own dispatcher in the place of this one).
    """

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        self.experts = experts

    @property
    def is_local(self) -> bool:
        """Whether all experts are on this device, so that a layer may give them their tokens without a transfer."""
        return False

    def resize(self, experts: int) -> None:
        """Moves tokens to so many experts from now on: to physical ones, of which a logical one may have several.

        It is called before `bind`. `Routing` then numbers physical experts.

        Args:
            experts: physical experts of the layer, over all ranks.
        """
        self.experts = experts

    def bind(self, mesh: "DeviceMesh", placement: Placement) -> None:
        """Spreads the experts over ranks; without it all experts are on this device.

        Afterwards every rank dispatches its own tokens at the same time, and `ends_E` has an entry for each expert of
        this rank. `Routing` and all counts still number the experts of the whole layer.

        Args:
            mesh: the ranks, in one dimension.
            placement: where each expert is, over the ranks of the mesh.
        """
        raise NotImplementedError(f"{type(self).__name__} works on one device")

    @abstractmethod
    def start(self, x_TD: Tensor, routing: Routing) -> Handle:
        """Starts to send each token to its experts.

        Returns:
            A handle whose `wait` returns `(x_AD, ends_E, state)`: the rows ordered by expert, the index at which each
            expert's rows end, and what `start_combine` needs.
        """

    @abstractmethod
    def start_combine(self, y_AD: Tensor, state: Any) -> Handle:
        """Starts to send the experts' outputs back; the handle's `wait` returns y_TD, each row their gated sum."""

    def tallies(self, state: Any) -> dict[str, Tensor]:
        """What a transfer moved, as int64 scalars by name, padding included; none unless it is bound to ranks.

        A dispatcher between ranks reports `bytes_between_nodes` and `bytes_inside_nodes`: bytes of rows that this rank
        sent to other ranks in the forward pass, out and back, and `remote_nodes`: for each of its tokens the number of
        other nodes that it was sent to, added up. The backward pass sends as many bytes again.

        Args:
            state: what the `wait` of `start` returned.
        """
        return {}
