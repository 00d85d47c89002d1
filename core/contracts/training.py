"""The slots that hand Lightning and torch their own objects: optimizer, callback, logger."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from core.contracts.component import Component
from core.contracts.schedule import Progress, value_at
from core.contracts.strategy import (
    StrategyFactory as StrategyFactory,  # plugins may import it from here too
)

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from torch import Tensor
    from torch.optim import Optimizer


ParameterKind = Literal["matrix", "stack", "vector", "table"]
"""The form of a weight: one matrix, one for each expert, a vector, or a row for each token of the vocabulary."""


class MatrixShard(Protocol):
    """The part that this rank owns of matrices that are divided over ranks; tensors have the form of the parameter."""

    def gather(self, part: "Tensor") -> "Tensor":
        """Gathers whole matrices from the parts of all ranks that share them.

        It is a collective: these ranks call it for the same parameters in the same order.
        """

    def shard_of(self, whole: "Tensor") -> "Tensor":
        """This rank's part of whole matrices."""


@dataclass(frozen=True)
class NamedParameter:
    """A weight that an optimizer updates.

    Args:
        name: its name in the state dict.
        parameter: the weight.
        role: what the layer that owns it is for (`core.contracts.precision.ROLES`, or a component's `roles` or
            `weight_roles`); empty if no layer with a role owns it.
        kind: the form of the weight.
        shard: how the whole matrices are gathered and divided again; None: every matrix in `parameter` is whole. A
            stack that is divided between its matrices holds fewer of them, and each is whole.
    """

    name: str
    parameter: "Tensor"
    role: str
    kind: ParameterKind
    shard: MatrixShard | None = None


class OptimizerFactory(Component, ABC):
    """Makes torch optimizers and says which learning rate each step uses.

    Every weight is in exactly one group of one optimizer. Before each step a group's `lr` is set to the schedule's
    value times the group's `lr_scale`, 1 if it has none.

    Class attributes:
        needs_whole_matrices: whether an update reads whole matrices (Muon, for example). A strategy that shards
            weights gives the optimizer the part of each weight that its rank owns, so a recipe with both is an error
            unless the optimizer gathers.
        gathers_matrices: whether an optimizer that needs whole matrices gathers them by `NamedParameter.shard`.
    """

    needs_whole_matrices: ClassVar[bool] = False
    gathers_matrices: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def needs_whole_of(cls, config: Any) -> bool:
        """Whether an update under these settings reads whole matrices that it does not gather.

        By default this follows from the class attributes.
        """
        return cls.needs_whole_matrices and not cls.gathers_matrices

    @abstractmethod
    def make(self, parameters: "Sequence[NamedParameter]") -> "Optimizer | list[Optimizer]":
        """Makes the optimizer of the weights, or several that step one after the other."""

    def check_parameters(self, parameters: "Sequence[NamedParameter]") -> None:
        """Checks that the settings suit the weights of a model, before anything starts; by default they do.

        Args:
            parameters: whole weights on the meta device.

        Raises:
            ConfigError: a setting does not; the error names its key.
        """

    def state_bytes(self, parameter: "Tensor") -> int:
        """The bytes that the optimizer keeps for a parameter: two moments in its format, unless overridden."""
        return 2 * parameter.numel() * parameter.element_size()

    def state_bytes_of(self, named: NamedParameter) -> int:
        """The bytes that the optimizer keeps for a weight whose role and kind are known; by default `state_bytes`."""
        return self.state_bytes(named.parameter)

    def learning_rate(self, progress: Progress) -> float:
        """The learning rate of the step that ends at `progress`: by default the schedule `lr` of the `Config`."""
        return value_at(self.config.lr, progress)


@dataclass
class WeightAverage:
    """Averaged weights that a callback keeps beside those that are trained.

    The callback updates them in `on_train_batch_end`, where its module has `local_parameters.named` (a `NamedParameter`
    for each weight or part of a weight that this rank owns), `windows_done` (steps, skipped ones included) and
    `skipped_in_a_row` (0 unless the step just done was skipped). The run does everything else: it validates the
    averages beside the weights, writes them into every checkpoint, and hands them back, on the CPU, when it continues.

    Args:
        name: what `--weights` and the names of metrics call it.
        settings: the settings that shape the average; a run continues only with those that its checkpoint has.
        updates: how many updates there were.
        weights: the averages, by the names that the weights have in the model, each of the shape of the part of the
            weight that this rank owns; empty until the first update.
    """

    name: str
    settings: Mapping[str, int | float | str]
    updates: int = 0
    weights: "dict[str, Tensor]" = field(default_factory=dict)


class CallbackFactory(Component, ABC):
    """Makes a Lightning callback for a run folder.

    A callback may end the run by setting `trainer.should_stop`, on every rank alike: the run then saves a checkpoint
    and writes its summary. Its attribute `end_reason`, a sentence or None, says why in the summary's notices.

    Class attributes:
        average: the name of the averaged weights that its callback keeps as its attribute `average`, a
            `WeightAverage`; None: it keeps none.
    """

    average: ClassVar[str | None] = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def make(self, folder: Path) -> "Callback":
        """Makes the callback."""

    def average_bytes(self, parameter: "Tensor") -> int:
        """The bytes on the training device that the average of a weight takes; 0 unless overridden."""
        return 0


class LoggerFactory(Component, ABC):
    """Makes a Lightning logger that writes into a run folder; its `save()` writes all that was logged to disk."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def make(self, folder: Path, *, resumed_at: int | None) -> "Logger":
        """Makes the logger; in a run resumed at a step it continues its files and removes what came after that step.

        No file is touched before the first number is logged.
        """

    def check_resume(self, folder: Path, *, step: int, every: int) -> list[str]:
        """Checks the logger's files before a run continues; the default finds nothing.

        Args:
            folder: the run folder.
            step: the last step that is done.
            every: steps between two rows.

        Returns:
            Notes about what is missing from the log although the run goes on.

        Raises:
            UserError: a file is damaged, or cut short.
        """
        return []
