"""The callback that updates the average after steps.

Lightning's own callback, `WeightAveraging`, copies the whole module, counts the steps of every optimizer, and swaps
average and weights in validation, in checkpoints and at the end. Here only torch's rule of the average is used; what
else belongs to an average is done by the run (`core.contracts.training.WeightAverage`).
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from core.contracts.errors import UserError
from core.contracts.training import NamedParameter, WeightAverage
from core.numerics.promotion import at_least_fp32


class EmaCallback(L.Callback):
    """Keeps the average a <- decay a + (1 - decay) w of every weight w, in fp32 or wider.

    The first update copies the weights. A step that was skipped for a non-finite gradient is no update. Buffers, such
    as selection biases, are not averaged: `--weights ema` takes them from the weights' own state.

    Args:
        config: the keys of the recipe's section.

    Attributes:
        average: the averages so far, with the settings that shape them.
    """

    def __init__(self, config: Any) -> None:
        self.first_step = int(config.first_step)
        self.every_steps = int(config.every_steps)
        self.on_cpu = config.device == "cpu"
        settings = {
            "decay": float(config.decay),
            "first_step": self.first_step,
            "every_steps": self.every_steps,
        }
        self.average = WeightAverage("ema", settings)
        self._follow = get_ema_multi_avg_fn(float(config.decay))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises `UserError` for a run that ends before the average begins."""
        steps = pl_module.plan.steps  # type: ignore[union-attr]
        if stage == TrainerFn.FITTING and self.first_step > steps:  # type: ignore[operator]
            why = f"the average would begin after it, and the run has {steps} steps"
            raise UserError(f"callbacks: ema: first_step = {self.first_step}: {why}")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Updates the average after a step that is due and was not skipped."""
        module: Any = pl_module
        if module.skipped_in_a_row == 0 and self.is_due(module.windows_done):
            self.update(module.local_parameters.named)

    def is_due(self, step: int) -> bool:
        """Whether the average is updated after a step, counted from 1 as in the log, skipped steps included."""
        return step >= self.first_step and (step - self.first_step) % self.every_steps == 0

    @torch.no_grad()
    def update(self, weights: Sequence[NamedParameter]) -> None:
        """Lets the average follow the weights, or begins it as their copy.

        Args:
            weights: the weights, or the parts of divided weights, that this rank owns.
        """
        average = self.average
        if average.updates == 0:
            for named in weights:
                average.weights[named.name] = self._to_average(named.parameter).clone()
        elif self.on_cpu:
            for named in weights:  # one at a time, so that no second copy of all weights is made
                self._follow_weights([named])
        else:
            self._follow_weights(weights)
        average.updates += 1

    def _follow_weights(self, weights: Sequence[NamedParameter]) -> None:
        """Updates the averages of some weights in place."""
        kept: list[Tensor] = []
        current: list[Tensor] = []
        for named in weights:
            now = self._to_average(named.parameter)
            before = self.average.weights[named.name]
            if before.device != now.device:  # it was read from a checkpoint
                before = before.to(now.device)
                self.average.weights[named.name] = before
            kept.append(before)
            current.append(now)
        self._follow(kept, current, self.average.updates)

    def _to_average(self, weight: Tensor) -> Tensor:
        """A weight in the format and on the device of its average; the weight itself if it has both."""
        weight = at_least_fp32(weight.detach())
        return weight.cpu() if self.on_cpu else weight
