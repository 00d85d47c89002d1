"""The Trainer of a run: Lightning's own parts, told what the recipe says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger

from core.recipe.schema import RecipeSchema
from core.training.callbacks import KeepLatest, LoadLog, StepLog, StopOnSignal
from core.training.checkpoints import WholeFiles
from core.training.throughput import Throughput


class Bar(RichProgressBar):
    """Lightning's bar with what one looks at: loss, MaxVio, tokens per second, time left. Stdout stays the result's."""

    def __init__(self) -> None:
        super().__init__(leave=True, console_kwargs={"stderr": True})

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The bar's numbers under short names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if "tokens_per_second" in metrics:
            metrics["tokens/s"] = round(float(metrics.pop("tokens_per_second")))  # type: ignore[arg-type]
        return metrics


class Best(ModelCheckpoint):
    """Lightning's, which forgets the best loss so far where the run folder has been moved: the same folder to us."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state of a checkpoint."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


def make_trainer(
    recipe: RecipeSchema,
    folder: Path,
    *,
    steps: int,
    loggers: list[Logger],
    watchers: list[L.Callback],
    stop: StopOnSignal,
    strategy: dict[str, Any],
) -> L.Trainer:
    """The Trainer of a run.

    One epoch is the whole run: the loader yields every window once, whatever steps are skipped.

    Args:
        steps: windows of the run.
        loggers: from the recipe's logger sections.
        watchers: callbacks of the run and of the recipe.
        stop: saves and leaves when a signal says so.
        strategy: accelerator, devices and strategy.
    """
    options = dict(recipe.trainer)
    if options.get("enable_progress_bar", True):
        watchers = [*watchers, Bar()]
    return L.Trainer(
        **strategy,
        **{"log_every_n_steps": 1, "enable_model_summary": False, **options},
        default_root_dir=folder,
        logger=loggers,
        callbacks=[*watchers, StepLog(), *_checkpoints(recipe, folder), stop],
        plugins=[WholeFiles()],
        max_epochs=1,
        check_val_every_n_epoch=None,
        val_check_interval=recipe.validation.every_steps or steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _checkpoints(recipe: RecipeSchema, folder: Path) -> list[L.Callback]:
    """The one with the best validation loss, where there is one, and the latest few, which remember which was best."""
    latest = KeepLatest(folder, every=recipe.checkpoint.every_steps, keep=recipe.checkpoint.keep)
    if not any("next_token" in head.component.capabilities for head in recipe.model.heads.values()):
        return [latest]
    best = Best(
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
class Watchers:
    """The callbacks that every run has and that are asked afterwards."""

    loads: LoadLog
    stop: StopOnSignal
    throughput: Throughput


def watch(folder: Path, peak_flops: float | None) -> Watchers:
    """New ones for a run; `peak_flops` is measured, None where Lightning's table of GPUs is to say it."""
    return Watchers(LoadLog(folder), StopOnSignal(folder), Throughput(peak_flops))
