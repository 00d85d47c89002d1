"""The Trainer of a run: Lightning's own parts, set up as the recipe says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from core.checkpoints.saving import AtomicCheckpointIO
from core.contracts.errors import UserError
from core.recipe.recipe_schema import RecipeSchema
from core.training.callbacks import KeepLatest, LoadLog, StepLog, StopOnSignal
from core.training.launchers import Launch
from core.training.progress import ProgressLine
from core.training.rank_processes import RankLauncher, RunEnvironment
from core.training.ranks import all_ranks
from core.training.throughput import Throughput


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
    launch: Launch,
) -> L.Trainer:
    """The Trainer of a run.

    One epoch is the whole run: the loader yields every window once, whatever steps are skipped.

    Args:
        steps: windows of the run.
        loggers: the loggers of the recipe.
        callbacks: callbacks of the run and of the recipe.
        stop: saves and stops the run when a signal arrives.
        strategy: accelerator, devices and strategy.
        launch: this process among the ranks.

    Raises:
        UserError: the strategy makes another number of ranks than the recipe says.
    """
    environment = RunEnvironment(launch)
    world = WorldCheck(recipe.strategy.name, launch.world)
    options = dict(recipe.trainer)
    if options.pop("enable_progress_bar", True):
        callbacks = [*callbacks, ProgressLine()]
    trainer = _trainer(
        **strategy,
        **{"log_every_n_steps": 1, "enable_model_summary": False, **options},
        default_root_dir=folder,
        logger=loggers,
        callbacks=[world, *callbacks, StepLog(), *_checkpoints(recipe, folder), stop],
        plugins=[_checkpoint_io(recipe), environment],
        enable_progress_bar=False,
        max_epochs=1,
        check_val_every_n_epoch=None,
        val_check_interval=recipe.validation.every_steps or steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer._signal_connector = _NoSignals(trainer)
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        timeout = getattr(trainer.strategy, "_timeout", None)
        trainer.strategy._launcher = RankLauncher(environment, folder, timeout)
    world.compare(trainer.num_devices * trainer.num_nodes)
    return trainer


def _trainer(**options: Any) -> L.Trainer:
    """Makes a Trainer.

    Raises:
        UserError: Lightning does not take the options: a device that is missing, a key of `trainer` with another value.
    """
    try:
        return L.Trainer(**options)
    except MisconfigurationException as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"strategy or trainer: Lightning cannot start with these keys: {why}"
        ) from error


class _NoSignals(_SignalConnector):
    """Handles no signal: Lightning's handlers talk to other ranks in the middle of a step, and requeue SLURM jobs."""

    def register_signal_handlers(self) -> None:
        """Leaves all signals to `StopOnSignal`."""


class WorldCheck(L.Callback):
    """Compares the ranks that train with those that the recipe asks for, before the first step."""

    def __init__(self, name: str, asked: int) -> None:
        self.name = name
        self.asked = asked

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Counts the members of the process group; there is none where one rank trains."""
        self.compare(all_ranks()[1])

    def compare(self, world: int) -> None:
        """Raises `UserError` if the number of ranks is another one."""
        if world != self.asked:
            raise UserError(
                f"strategy.name = {self.name}: {world} ranks would train, and the recipe asks for {self.asked} "
                "(strategy.ranks; 1 without that key)"
            )


def _checkpoints(recipe: RecipeSchema, folder: Path) -> list[L.Callback]:
    """The callbacks that save the latest checkpoints and, with a next-token head, the one of the best validation loss.

    A run whose `checkpoint.every_steps` is null has none.

    The best one is first in the list, so that the latest checkpoints hold its state.
    """
    every = recipe.checkpoint.every_steps
    if every is None:
        return []
    latest = KeepLatest(
        folder,
        every=every,
        keep=recipe.checkpoint.keep,
        keep_every=recipe.checkpoint.keep_every_steps,
    )
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


def _checkpoint_io(recipe: RecipeSchema) -> AtomicCheckpointIO:
    """Writes checkpoints in one file, or each rank's parts in files of its own."""
    if not recipe.shards_checkpoints:
        return AtomicCheckpointIO()
    from core.checkpoints.sharded_saving import ShardedCheckpointIO

    return ShardedCheckpointIO(asynchronous=recipe.checkpoint.asynchronous)


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks that every run has and whose results are read afterwards."""

    loads: LoadLog
    stop: StopOnSignal
    throughput: Throughput


def make_run_callbacks(
    recipe: RecipeSchema, folder: Path, peak_flops: float | None
) -> RunCallbacks:
    """Makes the callbacks of a run; `peak_flops` is the measured peak, None to look it up or to measure it."""
    stop = StopOnSignal(folder, saves=recipe.checkpoint.every_steps is not None)
    return RunCallbacks(LoadLog(folder), stop, Throughput(peak_flops))
