"""Training with weights that are divided over ranks: the parts that a rank owns, and their checkpoints.

Checkpoints have the same content under every strategy, in one file or in shards, so a run may continue under another
strategy, with another number of ranks.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from core.checkpoints.averages import AVERAGES, index_prefix
from core.checkpoints.content import diverged, not_finite
from core.checkpoints.distributed import load_shards
from core.checkpoints.reading import OPTIMIZERS, metadata_of, open_shards
from core.checkpoints.sharded_saving import ShardedCheckpointIO
from core.checkpoints.shards import MODEL, ShardReader
from core.checkpoints.tensor_shard import TensorShard
from core.contracts.errors import UserError
from core.contracts.strategy import StrategyFactory
from core.numerics.part_exchange import local_tensor
from core.numerics.promotion import at_least_fp32
from core.training.local_parameters import LocalParameters
from core.training.ranks import first_text_over_ranks
from core.training.weight_shards import (
    WeightShard,
    check_over_ranks,
    load_full_state,
    weight_shards,
)


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
    """Lightning's strategy for models that divide their weights themselves.

    The module divides its model in `configure_model`, by `StrategyFactory.parallelize`. A checkpoint is sharded if the
    Trainer's `CheckpointIO` is a `ShardedCheckpointIO`, and is one file that the first rank writes if not; it reads
    both.

    Args:
        factory: the strategy of the recipe.
        offload: whether weights stay on the CPU.
        timeout: how long a collective waits for a rank.

    Attributes:
        parts: this rank's part of every weight, by its name in the module.
    """

    def __init__(
        self,
        factory: StrategyFactory,
        *,
        offload: bool = False,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(1, 1, save_distributed_checkpoint=False, timeout=timeout)
        self.factory = factory
        self.offload = offload
        self.parts: dict[str, WeightShard] = {}
        self._reader: ShardReader | None = None

    @property
    def saves_shards(self) -> bool:
        """Whether each rank writes its own parts of a checkpoint."""
        return isinstance(self.checkpoint_io, ShardedCheckpointIO)

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
        """The state of the module: this rank's parts, or whole tensors on the first rank and nothing on the others."""
        assert self.model is not None
        if self.saves_shards:
            return {**self.model.state_dict(), **self._local_parts()}
        found: dict[str, Any] = {}
        for name, value in self.model.state_dict().items():
            if name in self.parts and self.parts[name].is_sharded:
                value = self.parts[name].gather(local_tensor(value))
            if self.is_global_zero:
                found[name] = value.cpu() if isinstance(value, Tensor) else value
        return found

    def _local_parts(self) -> dict[str, TensorShard]:
        """This rank's part of every tensor of the module, by name."""
        assert self.model is not None
        found: dict[str, TensorShard] = {}
        for name, value in self.model.state_dict().items():
            if name in self.parts:
                found[name] = self.parts[name].place(local_tensor(value))
            elif isinstance(value, Tensor):
                found[name] = TensorShard.whole(local_tensor(value))
        return found

    def like_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Tensors of the form of weights, as they are saved: this rank's parts, or whole ones on the first rank.

        Args:
            tensors: this rank's parts by the names of their weights in the module.
        """
        found: dict[str, Any] = {}
        for name, tensor in tensors.items():
            shard = self.parts[name]
            if self.saves_shards:
                found[name] = shard.place(tensor)
                continue
            if shard.is_sharded:
                tensor = shard.gather(tensor.to(local_tensor(shard.weight).device))
            if self.is_global_zero:
                found[name] = tensor.cpu()
        return found

    def load_like_weights(self, average: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of the averaged weights of the checkpoint that the run continues from.

        Args:
            average: the name of the average.
            stored: whole tensors by the names of their weights in the module; those of a sharded checkpoint are on
                the meta device.
        """
        found: dict[str, Tensor] = {}
        if self._reader is None:
            for name, tensor in stored.items():
                found[name] = self.parts[name].shard_of(tensor).clone()
            return found
        places: dict[str, TensorShard] = {}
        for name, tensor in stored.items():
            shape = local_tensor(self.parts[name].weight).shape
            found[name] = torch.empty(shape, dtype=tensor.dtype)
            places[f"{index_prefix(average)}{name}"] = self.parts[name].place(found[name])
        self._load(places)
        self._check_finite({"state_dict": {}, AVERAGES: {average: {"weights": found}}})
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copies this rank's parts of the weights of a checkpoint into the module."""
        assert self.model is not None
        if self._reader is None:
            load_full_state(self.model, checkpoint["state_dict"], self.parts)
            return
        self._load({f"{MODEL}{name}": part for name, part in self._local_parts().items()})
        self._check_finite({"state_dict": self.model.state_dict()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state: this rank's parts, or whole tensors on the first rank and nothing on the others."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state = optimizer.state_dict()
        if self.saves_shards:
            return self._convert_state(optimizer, state, WeightShard.place)

        def gather(shard: WeightShard, part: Tensor) -> Tensor | None:
            gathered = shard.gather(part)
            return gathered.cpu() if self.is_global_zero else None

        state = self._convert_state(optimizer, state, gather)
        return state if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Hands the optimizers their parts of the states of a checkpoint."""
        states = checkpoint["optimizer_states"]
        for number, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True)):
            optimizer = getattr(optimizer, "_optimizer", optimizer)
            if self._reader is None:
                state = self._convert_state(optimizer, state, WeightShard.shard_of)
            else:
                state = self._read_optimizer(optimizer, state, f"{OPTIMIZERS}{number}.state")
            optimizer.load_state_dict(state)
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read_optimizer(
        self, optimizer: Optimizer, state: Mapping[str, Any], prefix: str
    ) -> dict[str, Any]:
        """This rank's part of the state of an optimizer in a sharded checkpoint.

        Args:
            optimizer: the optimizer.
            state: its state, in which tensors of a weight's form are on the meta device.
            prefix: how the names of its tensors begin.
        """

        def allocate(shard: WeightShard, stored: Tensor) -> Tensor:
            return torch.empty(local_tensor(shard.weight).shape, dtype=stored.dtype)

        state = self._convert_state(optimizer, state, allocate)
        shards = self.optimized_shards(optimizer)
        parts: dict[str, TensorShard] = {}
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim:
                    parts[f"{prefix}.{index}.{key}"] = shards[index].place(value)
        self._load(parts)
        self._check_finite({"state_dict": {}, "optimizer_states": [state]})
        return state

    def _load(self, parts: Mapping[str, TensorShard]) -> None:
        """Reads parts of the sharded checkpoint that the run continues from."""
        assert self._reader is not None
        load_shards(parts, self._reader)

    def _check_finite(self, content: Mapping[str, Any]) -> None:
        """Raises `NotFiniteError` on every rank if what one of them has read is not finite."""
        assert self._reader is not None
        state = content["state_dict"]
        own = {name: local_tensor(v) for name, v in state.items() if isinstance(v, Tensor)}
        found = first_text_over_ranks(not_finite({**content, "state_dict": own}))
        if found:
            raise diverged(self._reader.folder, found)

    def _convert_state(
        self,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        convert: Callable[[WeightShard, Tensor], Any],
    ) -> dict[str, Any]:
        """The state of an optimizer with every tensor of a weight's form converted.

        Args:
            optimizer: the optimizer.
            state: what its `state_dict` returned, of parts or of whole weights.
            convert: makes whole tensors of parts, or parts of whole ones.
        """
        converted: dict[int, dict[str, Any]] = {}
        parts = self.optimized_shards(optimizer)
        for index in sorted(state["state"]):
            values = {}
            for name, value in state["state"][index].items():
                if isinstance(value, Tensor):
                    value = convert(parts[index], value) if value.ndim else value.cpu()
                values[name] = value
            converted[index] = values
        return {**state, "state": converted}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Writes the checkpoint: every rank its parts, or the first rank all of it."""
        if self.saves_shards or self.is_global_zero:
            self.checkpoint_io.save_checkpoint(
                checkpoint, filepath, storage_options=storage_options
            )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint on every rank; its weights and states are handed over afterwards.

        Of a sharded one the files are compared with their checksums, each by one rank.

        Raises:
            UserError: it is damaged; raised on every rank.
        """
        path = Path(checkpoint_path)
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        self._reader = open_shards(path)
        check_over_ranks(self._reader)
        return metadata_of(self._reader)

    def teardown(self) -> None:
        """Ends Lightning's part, and waits for a checkpoint that is being written.

        A run that ends by an exception ends by that one, also if the checkpoint cannot be written either.
        """
        is_failing = sys.exc_info()[0] is not None
        try:
            super().teardown()
        finally:
            try:
                self.checkpoint_io.teardown()
            except UserError:
                if not is_failing:
                    raise


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers of a module, and of the modules in it, to a device, and leaves its weights where they are."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)
