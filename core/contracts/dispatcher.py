"""The dispatcher slot: how tokens travel to their experts and back."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from core.contracts.build import BuildContext
from core.contracts.component import Component
from core.contracts.router import Routing


class Handle(ABC):
    """A transfer under way; other work may be done between `start` and `wait`."""

    @abstractmethod
    def wait(self) -> Any:
        """What was transferred."""


class Dispatcher(Component, ABC):
    """Moves tokens to experts and the experts' outputs back, in two transfers that may overlap other work.

    Owns no parameter. A dropped assignment adds nothing to its token's output.
    """

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        self.experts = experts

    @abstractmethod
    def start(self, x_TD: Tensor, routing: Routing) -> Handle:
        """Begin to send; the handle waits for `(x_AD, ends_E, state)`: rows by expert, where each expert's end."""

    @abstractmethod
    def start_combine(self, y_AD: Tensor, state: Any) -> Handle:
        """Begin to return; the handle waits for y_TD, each row the gated sum of its experts' outputs."""
