"""Callbacks of a run: the log of steps and of loads, the checkpoints, the signals that stop it.

Lightning calls callbacks in their order, those that save last. A checkpoint is taken where a step has ended:
its row is on disk, and so is its validation where one is due. A kill at any moment therefore leaves a log that
is never behind the newest checkpoint, and a resumed run neither repeats a row nor misses one.
"""

import os
import signal
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save
from torch import Tensor

from core.checkpoints.listing import checkpoints_in, is_checkpoint, remove_checkpoint, step_of
from core.checkpoints.saving import AtomicCheckpointIO
from core.command import STOPPING, show_cursor, terminated
from core.contracts.errors import Interrupted
from core.training.module import TrainingModule
from core.training.ranks import max_over_ranks

SNAPSHOTS = 256
"""Snapshots of load and bias that a run keeps; past it every second one is dropped."""


class StepLog(L.Callback):
    """Hands each step's numbers to the loggers.

    Lightning would do so after every callback has seen the step, the checkpoints among them: a kill in between
    would leave a checkpoint whose own step is missing from the log.
    """

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Writes one row for each step, or for every `trainer.log_every_n_steps`-th."""
        assert isinstance(pl_module, TrainingModule)
        if pl_module.windows_done % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.write_row(pl_module.step_values)


class LoadLog(L.Callback):
    """Expert counts and selection biases by step and layer, thinned, in `loads.safetensors`.

    Keeps every `stride`-th step; the stride doubles whenever the log is full, so any run fits. Also remembers
    the last 100 steps' MaxVio for the summary.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "loads.safetensors"
        self.stride = 1
        self.snapshots: list[tuple[int, dict[str, Tensor]]] = []
        self.recent: deque[float] = deque(maxlen=100)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Takes a snapshot if the step is one to keep."""
        assert isinstance(pl_module, TrainingModule)
        if not pl_module.step_load:
            return
        self.recent.append(float(pl_module.step_values["load/max_vio_batch"]))
        if pl_module.windows_done % self.stride:
            return
        self.snapshots.append((pl_module.windows_done, _snapshot(pl_module)))
        if len(self.snapshots) > SNAPSHOTS:
            self.stride *= 2
            self.snapshots = [
                snapshot for snapshot in self.snapshots if snapshot[0] % self.stride == 0
            ]

    def write(self) -> None:
        """Writes `steps` [S], and for each layer `load.<path>` int64 [S, E] and `bias.<path>` fp32 [S, E]."""
        if not self.snapshots:
            return
        tensors = {"steps": torch.tensor([step for step, _ in self.snapshots])}
        for name in self.snapshots[-1][1]:
            tensors[name] = torch.stack([snapshot[name] for _, snapshot in self.snapshots])
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        temporary.write_bytes(save(tensors))
        os.replace(temporary, self.file)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Writes what is known so far with every checkpoint."""
        if trainer.is_global_zero:
            self.write()

    def state_dict(self) -> dict[str, Any]:
        """The log so far, in plain containers and tensors."""
        return {
            "stride": self.stride,
            "snapshots": list(self.snapshots),
            "recent": list(self.recent),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the log of a checkpoint."""
        self.stride = int(state_dict["stride"])
        self.snapshots = [(int(step), dict(tensors)) for step, tensors in state_dict["snapshots"]]
        self.recent = deque(map(float, state_dict["recent"]), maxlen=100)
        if self.stride < 1:
            raise ValueError(f"LoadLog.stride = {self.stride}: must be at least 1")
        for _, tensors in self.snapshots:
            for name, first in self.snapshots[0][1].items():
                if tensors[name].shape != first.shape:
                    raise ValueError(f"LoadLog.snapshots: {name} changes its shape")


def _snapshot(module: TrainingModule) -> dict[str, Tensor]:
    """Copies, on the CPU, of a step's load and of the selection biases after it."""
    tensors = {}
    for path, load_E in module.step_load.items():
        tensors[f"load.{path}"] = load_E.detach().cpu().clone()
    for path, layer in module.model.expert_layers().items():
        for balancer in layer.balancers:
            bias_E = balancer.selection_bias()
            if bias_E is not None:
                tensors[f"bias.{path}"] = bias_E.detach().cpu().clone()
    return tensors


class _StepEnd(Checkpoint):
    """Acts where a step has ended: after its validation, if it has one.

    Lightning by itself does not repeat a validation after a resume; only `StopOnSignal` saves earlier, and marks the
    validation as pending.
    """

    @abstractmethod
    def step_ended(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """Acts on the end of a step; called once for every step."""

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ends a step that is not validated."""
        assert isinstance(pl_module, TrainingModule)
        if not pl_module.validation_follows:
            self.step_ended(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends a step that was validated."""
        assert isinstance(pl_module, TrainingModule)
        if trainer.state.fn == TrainerFn.FITTING:
            self.step_ended(trainer, pl_module)


class StopOnSignal(_StepEnd):
    """A signal ends the run after the batch under way, with a checkpoint; a second one ends it at once.

    A signal to one rank is enough: all ranks stop after the same batch. A validation is given up, and repeated by the
    resumed run.

    Args:
        folder: the run folder.
        saves: whether the run saves checkpoints.
    """

    def __init__(self, folder: Path, *, saves: bool) -> None:
        self.folder = folder
        self.saves = saves
        self.signum = 0
        self.has_begun = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles signals within the context and restores their handlers afterwards; for the main thread only.

        SIGINT and SIGTERM are always handled, others only where neither the user nor another program does.
        """
        before = {}
        for signum in (signal.SIGINT, *STOPPING):
            always = signum in (signal.SIGINT, signal.SIGTERM)
            if always or signal.getsignal(signum) in (signal.SIG_DFL, terminated):
                before[signum] = signal.signal(signum, self._note)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that training begins: the checkpoint is restored, so a later exception is not its fault."""
        self.has_begun = True

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            show_cursor()
            os.write(2, b"\n")
            os._exit(128 + signum)
        self.signum = signum

    def step_ended(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """Saves and stops if some rank has received a signal."""
        signum = max_over_ranks(self.signum, module.device)
        if signum:
            self._save_and_stop(signum, trainer, module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops before the first batch of a validation."""
        self.stop_validation(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops after a batch of a validation."""
        self.stop_validation(trainer, pl_module)

    def stop_validation(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Saves and stops if some rank has received a signal; the validation is repeated after a resume."""
        assert isinstance(module, TrainingModule)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        signum = max_over_ranks(self.signum, module.device)
        if signum:
            module.validation_pending = True
            rewind_validation(trainer)
            self._save_and_stop(signum, trainer, module)

    def _save_and_stop(self, signum: int, trainer: L.Trainer, module: TrainingModule) -> NoReturn:
        """Saves the step just done, if the run saves any, and raises `Interrupted`."""
        if self.saves:
            save_step(trainer, module, self.folder)
            wait_until_saved(trainer)
        raise Interrupted(signum, module.windows_done, self.folder, saved=self.saves)


def rewind_validation(trainer: L.Trainer) -> None:
    """Sets Lightning's counters of the validation under way to those of one that is in its first batch.

    A resumed run goes on with a validation that such a checkpoint was in, here from its first batch.
    """
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.total.ready = progress.total.completed + 1
    progress.total.started = progress.total.ready
    progress.total.processed = progress.total.completed
    progress.current.ready = 1
    progress.current.started = 1
    progress.current.processed = 0
    progress.current.completed = 0


class KeepLatest(_StepEnd):
    """Saves every so many steps and keeps the latest few.

    Lightning's ModelCheckpoint counts optimizer steps, so a skipped one shifts it, and under manual
    optimization it warns about which weights it saves. The best checkpoint is still saved by ModelCheckpoint.

    Args:
        folder: the run folder.
        every: steps between checkpoints.
        keep: how many step checkpoints to keep.
        keep_every: the checkpoint of every so many steps is kept too; None: of no others.
    """

    def __init__(
        self, folder: Path, *, every: int, keep: int, keep_every: int | None = None
    ) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self.keep_every = keep_every

    def step_ended(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """Saves after every `every` steps and after the last one, and replaces a checkpoint without its validation."""
        due = module.windows_done % self.every == 0 or module.windows_done == module.plan.steps
        if due or module.windows_done == module.pending_step:
            self._save(trainer, module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves a run that something else has ended early as it is."""
        assert isinstance(pl_module, TrainingModule)
        if pl_module.windows_done:
            self._save(trainer, pl_module)
            wait_until_saved(trainer)
            self._remove_old(trainer)

    def _save(self, trainer: L.Trainer, module: TrainingModule) -> None:
        save_step(trainer, module, self.folder)
        self._remove_old(trainer)

    def _remove_old(self, trainer: L.Trainer) -> None:
        """Removes all but the latest checkpoints and those kept for good; one that is being written does not count."""
        if trainer.is_global_zero:
            for old in checkpoints_in(self.folder)[: -self.keep]:
                if self.keep_every is None or step_of(old) % self.keep_every:
                    remove_checkpoint(old)


def save_step(trainer: L.Trainer, module: TrainingModule, folder: Path) -> None:
    """Saves the checkpoint of the step just done, unless it exists; the loggers write to disk before it.

    One that was saved before the step's validation is replaced after it.
    """
    path = folder / "checkpoints" / checkpoint_name(module.windows_done)
    if checkpoint_files(trainer).is_saving(path):
        wait_until_saved(trainer)
    validated = module.windows_done == module.pending_step and not module.validation_pending
    if trainer.strategy.broadcast(is_checkpoint(path) and not validated):
        return
    if validated:
        module.pending_step = None
    for logger in trainer.loggers:
        logger.save()
    trainer.save_checkpoint(path, weights_only=False)  # weights_only here: save nothing but weights


def wait_until_saved(trainer: L.Trainer) -> None:
    """Returns when every checkpoint is on the disk, also those that are written while training goes on."""
    checkpoint_files(trainer).wait()


def checkpoint_files(trainer: L.Trainer) -> AtomicCheckpointIO:
    """What writes the checkpoints of a run."""
    files = trainer.strategy.checkpoint_io
    assert isinstance(files, AtomicCheckpointIO)
    return files


def checkpoint_name(step: int) -> str:
    """The file name of the checkpoint after a step."""
    return f"step-{step:08d}.ckpt"
