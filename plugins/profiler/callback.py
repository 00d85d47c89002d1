"""The callback that profiles a few steps with torch's profiler, and marks in the trace what belongs to a step.

Lightning calls a callback before and after a batch, but not around the loader or a checkpoint. It reports both to the
Trainer's profiler, which is therefore wrapped in one that passes everything on.
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.profilers import Profiler as LightningProfiler
from lightning.pytorch.trainer.states import TrainerFn

from core.contracts.errors import UserError
from plugins.profiler.analysis import BATCH, DATA, PAUSE, STEP
from plugins.profiler.files import ProfileFolder, table
from plugins.profiler.recording import Recording

LOADER = ".train_dataloader_next"
"""How Lightning's name for waiting for the loader ends."""

MARKED = {"run_training_batch": BATCH, "save_checkpoint": PAUSE}
"""Lightning's names of what is marked in the trace."""


class ProfilerCallback(L.Callback):
    """Profiles steps `first_step` to `first_step + steps - 1` of a run, and no part of them if they are not all run.

    Args:
        config: the keys of the recipe's section.
        folder: where the files go; it is made when the first step begins.
    """

    def __init__(self, config: Any, folder: Path) -> None:
        self.config = config
        self.first = int(config.first_step)
        self.last = self.first + int(config.steps) - 1
        self.files = ProfileFolder(folder)
        self.recording: Recording | None = None
        self.is_over = False

    @property
    def steps_text(self) -> str:
        """The profiled steps, as a text."""
        if self.first == self.last:
            return f"step {self.first}"
        return f"steps {self.first} to {self.last}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks what the recipe alone could not say, and wraps the Trainer's profiler.

        Raises:
            UserError: there are two callbacks of this kind, the run is too short, or a file is in the folder's place.
        """
        if stage != TrainerFn.FITTING:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, ProfilerCallback) for callback in callbacks) > 1:
            raise UserError("callbacks: profiler is there twice; a run has one profile at most")
        run_steps = pl_module.plan.steps  # type: ignore[union-attr]
        if self.last > run_steps:  # type: ignore[operator]
            why = f"the profile would end with step {self.last}, and the run has {run_steps}"
            raise UserError(f"callbacks: profiler: first_step = {self.first}: {why}")
        self.files.check()
        if self.config.ranks == "all" or trainer.global_rank == 0:
            observed = ObservedProfiler(trainer.profiler, self, trainer)  # type: ignore[attr-defined]
            trainer.profiler = observed  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says so if a run is continued after the first profiled step and there is no profile from before."""
        done = steps_done(trainer)
        self.is_over = done >= self.first
        if self.is_over and not self.files.summary.exists():
            self._say(
                trainer, f"{self.steps_text} not profiled: the run continues after step {done}"
            )

    def loader_begins(self, trainer: L.Trainer) -> None:
        """Starts to record if the first profiled step begins; marks that the loader is waited for."""
        if not self.is_over and self.recording is None and steps_done(trainer) == self.first - 1:
            self.files.prepare(trainer.global_rank)
            self.recording = Recording(self.config, trainer.strategy.root_device)
            self.recording.start()
        self.begin(DATA)

    def begin(self, mark: str) -> None:
        """Begins a mark in the trace, if one is recorded."""
        if self.recording is not None:
            self.recording.begin(mark)

    def end(self, mark: str) -> None:
        """Ends a mark in the trace, if one is recorded."""
        if self.recording is not None:
            self.recording.end(mark)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ends a step, and after the last one the profile."""
        if self.recording is None:
            return
        self.recording.end_step()
        if steps_done(trainer) < self.last:
            self.recording.begin(STEP)
            return
        recording = self.recording
        self.recording = None
        self.is_over = True
        self._write(trainer, recording)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor
    ) -> None:
        """Marks the backward pass of a micro-batch."""
        self.begin("profiler.backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the mark of the backward pass."""
        self.end("profiler.backward")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Marks a validation, which is no part of a step."""
        self.begin(PAUSE)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the mark of a validation."""
        self.end(PAUSE)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives up a profile if not all of its steps were run."""
        self._give_up(trainer, f"the run ended after step {steps_done(trainer)}")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Gives up a profile during which the run fails or is interrupted."""
        if self.recording is not None:
            self._give_up(trainer, f"the run stopped after step {steps_done(trainer)}")

    def _give_up(self, trainer: L.Trainer, why: str) -> None:
        """Ends the recording, writes nothing of it, and says so; a profile that is written stays as it is."""
        if self.is_over:
            return
        self.is_over = True
        recording = self.recording
        self.recording = None
        if recording is not None:
            recording.discard()
        self._say(trainer, f"{self.steps_text} not profiled: {why}; no profile is written")

    def _write(self, trainer: L.Trainer, recording: Recording) -> None:
        """Writes the files of every profiled rank, and on the first one the summary; prints its table there."""
        recording.stop()
        rank = trainer.global_rank
        own = self.files.write_rank(rank, recording)
        ranks = [own]
        if self.config.ranks == "all" and trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, own)
            ranks = gathered
        if trainer.is_global_zero:
            self.files.write_summary(ranks, first_step=self.first)
            where = f"{self.steps_text} profiled, in {self.files.path}"
            self._say(trainer, where)
            print(table(ranks), file=sys.stderr, end="")

    def _say(self, trainer: L.Trainer, sentence: str) -> None:
        """Prints a note on the first rank."""
        if trainer.is_global_zero:
            print(f"note: profiler: {sentence}", file=sys.stderr)


def steps_done(trainer: L.Trainer) -> int:
    """The steps that the run has done, skipped ones included."""
    return int(trainer.lightning_module.windows_done)  # type: ignore[arg-type]


class ObservedProfiler(LightningProfiler):
    """The Trainer's profiler, which also calls a callback when the loader, a batch and a checkpoint begin and end."""

    def __init__(
        self, inner: LightningProfiler, callback: ProfilerCallback, trainer: L.Trainer
    ) -> None:
        super().__init__()
        self.inner = inner
        self.callback = callback
        self.trainer = trainer

    def start(self, action_name: str) -> None:
        """Notes the beginning of something, by Lightning's name for it."""
        self.inner.start(action_name)
        if action_name.endswith(LOADER):
            self.callback.loader_begins(self.trainer)
        elif action_name in MARKED:
            self.callback.begin(MARKED[action_name])

    def stop(self, action_name: str) -> None:
        """Notes its end."""
        if action_name.endswith(LOADER):
            self.callback.end(DATA)
        elif action_name in MARKED:
            self.callback.end(MARKED[action_name])
        self.inner.stop(action_name)

    def summary(self) -> str:
        """The report of the wrapped profiler."""
        return self.inner.summary()

    def describe(self) -> None:
        """Prints the report of the wrapped profiler."""
        self.inner.describe()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Prepares the wrapped profiler for a stage."""
        self.inner.setup(stage, local_rank, log_dir)

    def teardown(self, stage: str | None) -> None:
        """Ends the stage of the wrapped profiler."""
        inner = getattr(self, "inner", None)  # Lightning's class calls this when it is deleted, too
        if inner is not None:
            inner.teardown(stage)
