"""The dispatcher slot: how tokens travel to their experts and back."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Component
from core.contracts.router import Routing


class Handle(ABC):
    """A transfer that is under way; other work may be done between `start` and `wait`."""

    @abstractmethod
    def wait(self) -> Any:
        """Waits for the transfer and returns what was transferred."""


class Dispatcher(Component, ABC):
    """Moves tokens to experts and the experts' outputs back, in two transfers that may overlap other work.

    It owns no parameter. A dropped assignment adds nothing to its token's output.
    """

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        self.experts = experts

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
