"""Averaged weights of a run: validated beside the weights, written into checkpoints, and read again.

Callbacks of a recipe keep them (`core.contracts.training.WeightAverage`); this module needs not know how they average.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from core.checkpoints.averages import AVERAGES
from core.contracts.training import WeightAverage
from core.training.callbacks import StopOnSignal
from core.training.module import TrainingModule
from core.training.ranks import max_over_ranks
from core.training.sharded import ShardedStrategy
from core.training.validation import ValidationTotals

MODEL = "model."
"""How the names of the language model's tensors begin in the training module."""


def averages_of(callbacks: Sequence[L.Callback]) -> list[WeightAverage]:
    """The averages that some callbacks keep."""
    found: list[WeightAverage] = []
    for callback in callbacks:
        average = getattr(callback, "average", None)
        if isinstance(average, WeightAverage):
            found.append(average)
    return found


@contextmanager
def in_place_of_weights(module: TrainingModule, average: WeightAverage) -> Iterator[None]:
    """A context in which the model computes with averaged weights; afterwards its weights are as they were.

    Meanwhile the weights are kept beside the average, on its device. Buffers stay those of the model.
    """
    named = module.local_parameters.named
    trained: dict[str, Tensor] = {}
    with torch.no_grad():
        for one in named:
            device = average.weights[one.name].device
            trained[one.name] = one.parameter.detach().to(device, copy=True)
        try:
            _free_gathered(module)
            for one in named:
                one.parameter.copy_(average.weights[one.name])
            yield
        finally:
            _free_gathered(module)
            for one in named:
                one.parameter.copy_(trained[one.name])


def _free_gathered(module: TrainingModule) -> None:
    """Frees whole weights that FSDP2 has gathered from their parts, so that they are gathered again from new ones."""
    for part in module.model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class Averages(L.Callback):
    """What a run does with the averages of its callbacks.

    Args:
        averages: those that callbacks keep, each with a name of its own.
        stop: says whether a signal has arrived.
    """

    def __init__(self, averages: Sequence[WeightAverage], stop: StopOnSignal) -> None:
        self.averages = averages
        self.stop = stop
        self._loaded: dict[str, tuple[int, dict[str, Tensor]]] = {}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the validation split once more with each average that has begun; the module logs the values."""
        assert isinstance(pl_module, TrainingModule)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        for average in self.averages:
            if average.updates:
                self._validate(trainer, pl_module, average)

    def _validate(self, trainer: L.Trainer, module: TrainingModule, average: WeightAverage) -> None:
        """Validates an average; a signal in between ends the run as one in the weights' own validation does."""
        totals = ValidationTotals(module.model, module.ledger, module.validation.bytes)
        totals = totals.to(module.device)
        limit = trainer.num_val_batches[0]
        loader: Any = trainer.val_dataloaders
        batches = islice(loader, None if math.isinf(limit) else int(limit))
        is_stopped = False
        with in_place_of_weights(module, average), trainer.precision_plugin.val_step_context():
            for index, batch in enumerate(batches):
                context = module.context(trainer.strategy.batch_to_device(batch), index)
                totals.update(module.model(context), context)
                is_stopped = bool(max_over_ranks(self.stop.signum, module.device))
                if is_stopped:
                    break
        if is_stopped:
            self.stop.stop_validation(trainer, module)
        for name, value in totals.compute().items():
            module.averages_validated[f"{average.name}/{name}"] = value

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the averages to a checkpoint, in the way in which the strategy saves the weights."""
        strategy = trainer.strategy
        saved: dict[str, Any] = {}
        for average in self.averages:
            tensors: dict[str, Any] = {
                f"{MODEL}{name}": tensor.detach() for name, tensor in average.weights.items()
            }
            if isinstance(strategy, ShardedStrategy):
                tensors = strategy.like_weights(tensors)
            saved[average.name] = {
                "settings": dict(average.settings),
                "updates": average.updates,
                "weights": tensors,
            }
        checkpoint[AVERAGES] = saved

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Reads this rank's parts of the averages of a checkpoint, which `check_averages` has accepted."""
        strategy = trainer.strategy
        for average in self.averages:
            stored = checkpoint.get(AVERAGES, {}).get(average.name)
            if stored is None:
                continue
            tensors = stored["weights"]
            if isinstance(strategy, ShardedStrategy):
                tensors = strategy.load_like_weights(average.name, tensors)
            weights = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}
            self._loaded[average.name] = (stored["updates"], weights)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hands the averages of a checkpoint back, once the weights are where they are trained."""
        for average in self.averages:
            if average.name in self._loaded:
                average.updates, average.weights = self._loaded.pop(average.name)
