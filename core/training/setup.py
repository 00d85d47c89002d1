"""The Trainer of a run: Lightning's own parts, set up as the recipe says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger

from core.recipe.recipe_schema import RecipeSchema
from core.training.callbacks import KeepLatest, LoadLog, StepLog, StopOnSignal
from core.training.checkpoints import AtomicCheckpointIO
from core.training.throughput import Throughput


class ProgressBar(RichProgressBar):
    """Lightning's progress bar with loss, MaxVio, tokens per second and time left; written to stderr."""

    def __init__(self) -> None:
        super().__init__(leave=True, console_kwargs={"stderr": True})

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The numbers of the progress bar under short names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if "tokens_per_second" in metrics:
            metrics["tokens/s"] = round(float(metrics.pop("tokens_per_second")))  # type: ignore[arg-type]
        return metrics


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which here keeps the best loss so far even if the run folder has been moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of a checkpoint as if it had been saved in this folder."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


def make_trainer(
    recipe: RecipeSchema,
    folder: Path,
    *,
    steps: int,
    loggers: list[Logger],
    callbacks: list[L.Callback],
    stop: StopOnSignal,
    strategy: dict[str, Any],
) -> L.Trainer:
    """The Trainer of a run.

    One epoch is the whole run: the loader yields every window once, whatever steps are skipped.

    Args:
        steps: windows of the run.
        loggers: the loggers of the recipe.
        callbacks: callbacks of the run and of the recipe.
        stop: saves and stops the run when a signal arrives.
        strategy: accelerator, devices and strategy.
    """
    options = dict(recipe.trainer)
    if options.get("enable_progress_bar", True):
        callbacks = [*callbacks, ProgressBar()]
    return L.Trainer(
        **strategy,
        **{"log_every_n_steps": 1, "enable_model_summary": False, **options},
        default_root_dir=folder,
        logger=loggers,
        callbacks=[*callbacks, StepLog(), *_checkpoints(recipe, folder), stop],
        plugins=[AtomicCheckpointIO()],
        max_epochs=1,
        check_val_every_n_epoch=None,
        val_check_interval=recipe.validation.every_steps or steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _checkpoints(recipe: RecipeSchema, folder: Path) -> list[L.Callback]:
    """The callbacks that save the latest checkpoints and, with a next-token head, the one of the best validation loss.

    The best one is first in the list, so that the latest checkpoints hold its state.
    """
    latest = KeepLatest(folder, every=recipe.checkpoint.every_steps, keep=recipe.checkpoint.keep)
    heads = [section.component for section in recipe.model.heads.values()]
    if not any("next_token" in head.capabilities for head in heads):
        return [latest]
    best = BestCheckpoint(
        dirpath=folder / "checkpoints",
        filename="best",
        monitor="val_loss",
        mode="min",
        save_top_k=1,
        every_n_epochs=1,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [best, latest]


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks that every run has and whose results are read afterwards."""

    loads: LoadLog
    stop: StopOnSignal
    throughput: Throughput


def make_run_callbacks(folder: Path, peak_flops: float | None) -> RunCallbacks:
    """Makes the callbacks of a run; `peak_flops` is the measured peak, None to use Lightning's table of GPUs."""
    return RunCallbacks(LoadLog(folder), StopOnSignal(folder), Throughput(peak_flops))
