"""Lightning's strategy for a pipeline: data ranks, and checkpoints of which each stage has some tensors.

A checkpoint has the same content as under every other strategy, in one file, which the first rank writes.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from core.numerics.part_exchange import local_tensor
from core.training.ranks import set_data_group
from core.training.sharded import ShardedStrategy
from core.training.weight_shards import WeightShard
from plugins.strategies.pipeline_stages import is_inside


class PipelineStrategy(ShardedStrategy):
    """Lightning's strategy for a model of which each rank holds the layers of its stage."""

    def setup_environment(self) -> None:
        """Starts the process group, arranges the ranks, and says which ones read different data."""
        super().setup_environment()
        set_data_group(self.factory.data_group(self.device_mesh))  # type: ignore[attr-defined]

    def setup(self, trainer: L.Trainer) -> None:
        """Sets the module and the optimizers up; weights of other stages stay on the meta device."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def model_to_device(self) -> None:
        """Moves what this rank holds to its device."""
        assert self.model is not None
        device = self.root_device
        self.lightning_module._device = device  # type: ignore[union-attr]
        self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))

    def teardown(self) -> None:
        """Ends Lightning's part; all ranks are data ranks again."""
        super().teardown()
        set_data_group(None)

    def _is_held(self, name: str) -> bool:
        """Whether this stage holds a tensor of the module, by its name there."""
        held: list[str] = self.factory.run.held  # type: ignore[attr-defined]
        return not name.startswith("model.") or is_inside(name.removeprefix("model."), held)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state of the module on the first rank, and nothing on the others."""
        assert self.model is not None
        state = self.model.state_dict()
        own: dict[str, Any] = {}
        for name, value in state.items():
            if not self._is_held(name):
                continue
            own[name] = self._whole(name, value) if isinstance(value, Tensor) else value
        found = self._gathered(own)
        return {name: found[name] for name in state if name in found}

    def _whole(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the module on the CPU, gathered over the ranks of the stage if they divide it."""
        if name in self.parts and self.parts[name].is_sharded:
            return self.parts[name].gather(local_tensor(value)).cpu()
        return value.cpu()

    def _gathered(self, own: dict[Any, Any]) -> dict[Any, Any]:
        """The values of all stages on the first rank; of a key that several have, that of the first stage."""
        run = self.factory.run  # type: ignore[attr-defined]
        if dist.get_rank(run.data) != 0:
            return {}
        values: list[Any] | None = None
        if self.is_global_zero:
            values = [None] * dist.get_world_size(run.pipe)
        dist.gather_object(own, values, dst=0, group=run.pipe)
        merged: dict[Any, Any] = {}
        for value in values or []:
            merged = {**value, **merged}
        return merged

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimizer on the first rank, and nothing on the others."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state = optimizer.state_dict()

        def gather(shard: WeightShard, part: Tensor) -> Tensor:
            return shard.gather(part).cpu()

        own = self._convert_state(optimizer, state, gather)["state"]
        found = self._gathered(own)
        if not self.is_global_zero:
            return {}
        return {**state, "state": {index: found[index] for index in sorted(found)}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Hands the optimizers the states of the weights that this rank holds."""
        own: list[dict[str, Any]] = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            shards = self.optimized_shards(getattr(optimizer, "_optimizer", optimizer))
            kept = {i: v for i, v in state["state"].items() if not shards[i].weight.is_meta}
            own.append({**state, "state": kept})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": own})
