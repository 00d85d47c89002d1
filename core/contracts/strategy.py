"""The strategy slot: on which devices a run works, and how they share the work."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from core.contracts.component import Component

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from core.contracts.schema import Section
    from core.contracts.training import NamedParameter


@dataclass(frozen=True)
class StageLayout:
    """What the ranks of one pipeline stage hold.

    Args:
        modules: the paths of the modules of the model whose weights they hold.
        in_flight: micro-batches whose activations they hold at once, at most; with several chunks not a whole
            number.
    """

    modules: Sequence[str]
    in_flight: float

    def holds(self, name: str) -> bool:
        """Whether a weight or a module belongs to the stage, by its name in the model."""
        return any(name == path or name.startswith(f"{path}.") for path in self.modules)


class StrategyFactory(Component, ABC):
    """Says on which devices a run works and how they share the work.

    Several ranks read other sequences of the same global batch. They are started by the first one, by torchrun or by
    srun; a run with another number of ranks than `ranks_of` is an error.

    A strategy that divides weights over the ranks overrides `parallelize`. The model is then built on the meta device
    with whole shapes, and every rank calls `parallelize` as soon as there is a process group. After it each rank draws
    the weights that it owns. Every weight is divided, so that each number of the model has one owner, and the backward
    of a window's last micro-batch leaves the gradient of what a rank owns, summed over all ranks. The Trainer's
    strategy is then `core.training.sharded.ShardedStrategy`, or derived from it.

    A strategy may also leave whole layers to other ranks: `parallelize` then names the weights of those in the model's
    `absent`, and they stay on the meta device. Such a strategy runs the micro-batches itself (`run_window`,
    `run_forward`), and adds up what the ranks counted (`all_totals`, `all_losses`).

    Class attributes:
        shards: whether weights are divided over the ranks; so it is where `parallelize` is overridden.
        saves_shards: whether each rank writes its own parts of checkpoints unless the recipe says otherwise; by default
            where weights are divided. False also refuses a recipe that asks for it.
    """

    shards: ClassVar[bool] = False
    saves_shards: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.shards = cls.parallelize is not StrategyFactory.parallelize
        if "saves_shards" not in vars(cls):
            cls.saves_shards = cls.shards

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def ranks_of(cls, config: Any) -> int:
        """The number of processes: by default the key `ranks`, 1 without it."""
        return int(getattr(config, "ranks", 1))

    @classmethod
    def nodes_of(cls, config: Any) -> int:
        """The number of machines, which have equally many ranks: by default the key `nodes`, 1 without it."""
        return int(getattr(config, "nodes", 1))

    @abstractmethod
    def trainer_arguments(self) -> dict[str, Any]:
        """Returns keyword arguments of `lightning.Trainer`: accelerator, devices of each machine, strategy."""

    def check_model(self, model: "nn.Module") -> None:
        """Checks that the strategy can divide a model, before anything starts; by default it can.

        Args:
            model: the language model of the recipe, on the meta device.

        Raises:
            ConfigError: it cannot; the error names the key of the strategy's section that does not fit.
        """

    @classmethod
    def check_recipe(cls, config: Any, recipe: Any) -> None:
        """Checks that the strategy can train a recipe whose sections are all valid; by default it can.

        Raises:
            ConfigError: it cannot; the error names the key of the strategy's section that does not fit.
        """

    @classmethod
    def expert_layout_of(cls, config: Any) -> tuple[int, int] | None:
        """The ranks over which experts are divided, and how many of them are one node; by default None."""
        return None

    @classmethod
    def stages_of(
        cls, config: Any, model: "nn.Module", micro_batches: int
    ) -> list[StageLayout] | None:
        """What each stage of a pipeline holds, first to last; by default None: every rank has all layers.

        Args:
            config: the settings of the strategy.
            model: the language model of the recipe, on the meta device.
            micro_batches: those of a step.
        """
        return None

    def mesh_dims(self) -> dict[str, int]:
        """The dimensions of the mesh of all ranks, by name, with their sizes; by default one, `data`."""
        return {"data": self.ranks_of(self.config)}

    def make_mesh(self, device: str) -> "DeviceMesh":
        """Arranges all ranks as a mesh, with the dimensions of `mesh_dims`.

        Args:
            device: the kind of device, `cpu` or `cuda`.
        """
        from torch.distributed.device_mesh import init_device_mesh

        dims = self.mesh_dims()
        return init_device_mesh(device, tuple(dims.values()), mesh_dim_names=tuple(dims))

    def replaced_dispatcher(self) -> "Section | None":
        """What replaces the dispatcher of every layer of a divided model: the key `dispatcher`; None without it."""
        found: Section | None = getattr(self.config, "dispatcher", None)
        return found

    def parallelize(self, model: "nn.Module", mesh: "DeviceMesh") -> None:
        """Shards the weights of a model that is on the meta device, where each still has its whole shape.

        No parameter is renamed. A layer with a matrix for each expert may be given fewer: its weight then holds
        `groups` of the `all_groups` matrices, from number `first_group` on (`core.numerics.linear.GroupedLinear`).
        The default leaves the model whole.

        Args:
            model: a language model.
            mesh: what `make_mesh` returned; under a strategy that this one is the `inner` of, the ranks that share the
                same layers, with the dimensions of `mesh_dims`.
        """

    def expert_group(self, mesh: "DeviceMesh") -> "ProcessGroup | None":
        """The ranks over which experts are divided, this one among them, in the order of the experts; None: none."""
        return None

    def gradient_scale(self, ranks: int) -> float:
        """The factor of each rank's loss with which exchanged gradients are the sum over ranks.

        The default is the number of ranks, because DistributedDataParallel takes the mean of their gradients.
        """
        return float(ranks)

    def set_requires_gradient_sync(self, model: "nn.Module", *, required: bool) -> None:
        """Says whether the next backward exchanges gradients; only the last one of a window does.

        Strategies of Lightning with a `block_backward_sync` need nothing here.
        """

    def gradient_norm(self, gradients: "Sequence[Tensor]") -> "Tensor":
        """The L2 norm of all gradients together, the same on every rank.

        Args:
            gradients: those of the weights, or of the parts of weights, that this rank owns. By default every rank
                owns all.
        """
        from torch.nn.utils import get_total_norm

        norm: Tensor = get_total_norm(gradients)
        return norm

    @classmethod
    def divides_weights_of(cls, config: Any) -> bool:
        """Whether several ranks hold parts of one matrix; by default where `parallelize` is overridden."""
        return cls.shards

    @classmethod
    def data_ranks_of(cls, config: Any) -> int:
        """The number of data ranks, which read different sequences; by default all ranks."""
        return cls.ranks_of(config)

    def run_window(self, work: Any) -> None:
        """Runs the micro-batches of a step forwards and backwards; by default one after the other, each as a whole.

        A strategy that leaves layers to other ranks runs those that this rank holds.

        Args:
            work: the `core.training.window.MicroBatches`.
        """
        for index in range(len(work.contexts)):
            work.run(index)

    def run_forward(self, model: "nn.Module", context: Any) -> Any:
        """Runs one micro-batch forwards; every rank calls this.

        Args:
            model: the language model.
            context: the micro-batch.

        Returns:
            Its `Losses`: those of the layers and heads that this rank holds.
        """
        return model(context)

    def all_losses(self, losses: Any) -> Any:
        """Adds to what `run_forward` returned what the ranks with other layers got for the same micro-batch."""
        return losses

    def all_totals(self, totals: Any, ledger: Any) -> Any:
        """Adds to a step's totals of this rank's layers, over all data ranks, those of layers on other ranks.

        Args:
            totals: the `core.training.totals.WindowTotals`.
            ledger: the loss terms of the whole model, the same on every rank.
        """
        return totals

    def exchange_gradients(self, weights: "Sequence[NamedParameter]") -> None:
        """Completes the gradients of a step, before their norm; by default the backward has done so.

        Args:
            weights: what the optimizer updates; those that other ranks hold have no gradient.
        """
