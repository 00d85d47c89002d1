"""Training with weights that are divided over ranks: the parts that a rank owns, and checkpoints of whole weights.

Checkpoints have the same content under every strategy, so a run may continue under another one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from core.contracts.strategy import StrategyFactory
from core.numerics.promotion import at_least_fp32
from core.training.local_parameters import LocalParameters, local
from core.training.weight_shards import WeightShard, load_full_state, weight_shards


def norm_over_ranks(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of gradients whose numbers are divided over all ranks, each on one of them."""
    device = gradients[0].device
    if torch.cuda.is_available() and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    own = torch.nn.utils.get_total_norm([at_least_fp32(gradient) for gradient in gradients])
    square = own.to(device).square()
    dist.all_reduce(square)
    return square.sqrt()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that divide their weights themselves, with checkpoints of whole weights.

    The module divides its model in `configure_model`, by `StrategyFactory.parallelize`.

    Args:
        factory: the strategy of the recipe.
        offload: whether weights stay on the CPU.

    Attributes:
        parts: this rank's part of every weight, by its name in the module.
    """

    def __init__(self, factory: StrategyFactory, *, offload: bool = False) -> None:
        super().__init__(1, 1, save_distributed_checkpoint=False)
        self.factory = factory
        self.offload = offload
        self.parts: dict[str, WeightShard] = {}

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the states of the optimizers of a checkpoint to `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Starts the process group and arranges the ranks as the recipe's strategy says."""
        self._setup_distributed()
        self._device_mesh = self.factory.make_mesh(self.root_device.type)

    def model_to_device(self) -> None:
        """Moves the module to this rank's device; weights that are kept on the CPU stay there."""
        assert self.model is not None
        if not self.offload:
            self.model.to(self.root_device)
            return
        # Collectives of a step use the module's device, which Lightning notes only where the whole module is moved.
        self.lightning_module._device = self.root_device  # type: ignore[union-attr]
        for module in self.lightning_module.children():  # type: ignore[union-attr]
            if any(True for _ in module.parameters()):
                _move_buffers(module, self.root_device)
            else:
                module.to(self.root_device)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Notes where the parts of all weights are, while no unit is gathered, and makes the optimizers."""
        assert self.model is not None
        group = self.factory.expert_group(self.device_mesh)
        self.parts = dict(weight_shards(self.model, group))
        super().setup_optimizers(trainer)

    def optimized_shards(self, optimizer: Optimizer) -> list[WeightShard]:
        """The parts that an optimizer updates, in the order of its state."""
        local_parameters: LocalParameters = self.lightning_module.local_parameters  # type: ignore[union-attr,assignment]
        by_id: dict[int, WeightShard] = {}
        for named in local_parameters.named:
            by_id[id(named.parameter)] = self.parts[f"model.{named.name}"]
        found: list[WeightShard] = []
        for group in optimizer.param_groups:
            found += [by_id[id(tensor)] for tensor in group["params"]]
        return found

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state of the module on the first rank, on the CPU; nothing on the others."""
        assert self.model is not None
        found: dict[str, Any] = {}
        for name, value in self.model.state_dict().items():
            if name in self.parts and self.parts[name].is_sharded:
                value = self.parts[name].gather(local(value))
            if self.is_global_zero:
                found[name] = value.cpu() if isinstance(value, Tensor) else value
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copies this rank's parts of the weights of a checkpoint into the module."""
        assert self.model is not None
        load_full_state(self.model, checkpoint["state_dict"], self.parts)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The whole state of an optimizer on the first rank, on the CPU; nothing on the others."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state = self._converted(optimizer, optimizer.state_dict(), WeightShard.gather, gathers=True)
        return state if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Hands the optimizers their parts of the states of a checkpoint."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer = getattr(optimizer, "_optimizer", optimizer)
            optimizer.load_state_dict(
                self._converted(optimizer, state, WeightShard.shard_of, gathers=False)
            )

    def _converted(
        self,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        convert: Callable[[WeightShard, Tensor], Tensor],
        *,
        gathers: bool,
    ) -> dict[str, Any]:
        """The state of an optimizer with every tensor of a weight's form converted.

        Args:
            optimizer: the optimizer.
            state: what its `state_dict` returned, of parts or of whole weights.
            convert: makes whole tensors of parts, or parts of whole ones.
            gathers: whether whole tensors are made, which are kept on the first rank alone.
        """
        converted: dict[int, dict[str, Any]] = {}
        parts = self.optimized_shards(optimizer)
        for index in sorted(state["state"]):
            values = {}
            for name, value in state["state"][index].items():
                if isinstance(value, Tensor) and value.ndim:
                    value = convert(parts[index], value)
                if isinstance(value, Tensor) and gathers:
                    value = value.cpu() if self.is_global_zero else None
                values[name] = value
            converted[index] = values
        return {**state, "state": converted}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Writes the checkpoint on the first rank."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(
                checkpoint, filepath, storage_options=storage_options
            )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint on every rank; its weights and states are handed over afterwards."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers of a module, and of the modules in it, to a device, and leaves its weights where they are."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)
