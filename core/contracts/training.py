"""The slots that hand Lightning and torch their own objects: optimizer, strategy, callback, logger."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contracts.component import Component
from core.contracts.schedule import Progress

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from torch import Tensor
    from torch.optim import Optimizer


class OptimizerFactory(Component, ABC):
    """Makes a torch optimizer and says which learning rate each step uses."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def make(self, parameters: "Iterable[tuple[str, Tensor]]") -> "Optimizer":
        """The optimizer of the named parameters; each group's `lr` is set before every step."""

    def state_bytes(self, parameter: "Tensor") -> int:
        """Bytes that the optimizer keeps for a parameter: two moments in its format, unless overridden."""
        return 2 * parameter.numel() * parameter.element_size()

    @abstractmethod
    def learning_rate(self, progress: Progress) -> float:
        """The learning rate of the step that ends at `progress`."""


class StrategyFactory(Component, ABC):
    """Says on which devices a run works and how they share it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def trainer_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `lightning.Trainer`: accelerator, devices, strategy."""


class CallbackFactory(Component, ABC):
    """Makes a Lightning callback for a run folder."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def make(self, folder: Path) -> "Callback":
        """The callback."""


class LoggerFactory(Component, ABC):
    """Makes a Lightning logger that writes into a run folder; its `save()` puts all it was given on disk."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def make(self, folder: Path, *, resumed_at: int | None) -> "Logger":
        """The logger; a run resumed at a step continues its files and forgets what came after that step."""
