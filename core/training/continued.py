"""The first steps of a run that continues another one: what of the parent's checkpoint it does not take."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from core.training.module import TrainingModule

BATCHES = "epoch_loop.batch_progress"
"""The key of Lightning's counters of steps in a checkpoint."""


class Continued(L.Callback):
    """Makes a checkpoint of the parent the beginning of a run with another length and other settings.

    - The parent's last step is not the last one here.
    - Its best checkpoint stays in its folder; the best one of this run is that of its own steps.
    - Settings of the optimizers are the recipe's, and not those that the parent had; moments are kept.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets the run continue with another number of threads than its parent."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.same_threads = False

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Changes what Lightning is about to restore."""
        checkpoint["loops"]["fit_loop"][BATCHES]["is_last_batch"] = False
        best = [c.state_key for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        for key in best:
            checkpoint["callbacks"].pop(key, None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the optimizers the recipe's settings, in place of those that came with their moments."""
        assert isinstance(pl_module, TrainingModule)
        made = pl_module.optimizer_factory.make(pl_module.local_parameters.named)
        fresh = made if isinstance(made, list) else [made]
        for optimizer, own in zip(trainer.optimizers, fresh, strict=True):
            for group, settings in zip(optimizer.param_groups, own.param_groups, strict=True):
                group.update(_without_weights(settings))


def _without_weights(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
