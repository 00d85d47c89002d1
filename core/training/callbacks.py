"""What watches a run: the log of loads, the checkpoints, the signal that stops it."""

import os
import signal
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save_file
from torch import Tensor

from core.training.checkpoints import checkpoints_in
from core.training.load import measures
from core.training.module import TrainingModule

SNAPSHOTS = 256
"""Snapshots of load and bias that a run keeps; past it every second one is dropped."""


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
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot where the step is one to keep."""
        assert isinstance(pl_module, TrainingModule)
        loads = pl_module.step_load
        if not loads:
            return
        self.recent.append(float(measures(list(loads.values()))["max_vio"]))
        if pl_module.windows_done % self.stride:
            return
        self.snapshots.append((pl_module.windows_done, _snapshot(pl_module)))
        if len(self.snapshots) > SNAPSHOTS:
            self.stride *= 2
            self.snapshots = [(step, tensors) for step, tensors in self.snapshots if step % self.stride == 0]

    def write(self) -> None:
        """`steps` [S], and for each layer `load.<path>` int64 [S, E] and `bias.<path>` fp32 [S, E]."""
        if not self.snapshots:
            return
        tensors = {"steps": torch.tensor([step for step, _ in self.snapshots])}
        for name in self.snapshots[-1][1]:
            tensors[name] = torch.stack([snapshot[name] for _, snapshot in self.snapshots])
        temporary = self.file.with_name(f"{self.file.name}.tmp")
        save_file(tensors, temporary)
        os.replace(temporary, self.file)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """What is known so far goes to disk with every checkpoint."""
        if trainer.is_global_zero:
            self.write()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {"stride": self.stride, "snapshots": list(self.snapshots), "recent": list(self.recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stands."""
        self.stride = state_dict["stride"]
        self.snapshots = [(step, dict(tensors)) for step, tensors in state_dict["snapshots"]]
        self.recent = deque(state_dict["recent"], maxlen=100)


def _snapshot(module: TrainingModule) -> dict[str, Tensor]:
    tensors = {f"load.{path}": load_E.detach().cpu().clone() for path, load_E in module.step_load.items()}
    for path, layer in module.model.expert_layers().items():
        for balancer in layer.balancers:
            bias_E = balancer.selection_bias()
            if bias_E is not None:
                tensors[f"bias.{path}"] = bias_E.detach().cpu().clone()
    return tensors


class Interrupted(Exception):
    """A signal asked the run to stop; it has saved and left.

    Args:
        signum: SIGINT or SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopOnSignal(L.Callback):
    """SIGINT and SIGTERM end the run after the step under way, with a checkpoint; a second one ends it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signum: int | None = None

    def listen(self) -> None:
        """Take over both signals, for this process's main thread."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: save and leave."""
        if self.signum is None:
            return
        assert isinstance(pl_module, TrainingModule)
        save_step(trainer, pl_module, self.folder)
        raise Interrupted(self.signum)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """A validation can be long; the last step's checkpoint is there already, or is made now."""
        if self.signum is None:
            return
        assert isinstance(pl_module, TrainingModule)
        if trainer.state.fn == TrainerFn.FITTING:
            save_step(trainer, pl_module, self.folder)
        raise Interrupted(self.signum)


class KeepLatest(Checkpoint):
    """Saves every so many steps and keeps the latest few.

    Lightning's ModelCheckpoint counts optimizer steps, so a skipped one shifts it, and under manual
    optimization it warns that it would rather save other weights; the best checkpoint is still its work.

    Args:
        folder: the run's.
        every: steps between checkpoints.
        keep: how many step checkpoints to keep.
    """

    def __init__(self, folder: Path, *, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step, before any validation."""
        assert isinstance(pl_module, TrainingModule)
        if pl_module.windows_done % self.every == 0 or pl_module.windows_done == pl_module.plan.steps:
            save_step(trainer, pl_module, self.folder)
            if trainer.is_global_zero:
                for old in checkpoints_in(self.folder)[: -self.keep]:
                    old.unlink()


def save_step(trainer: L.Trainer, module: TrainingModule, folder: Path) -> None:
    """Save the checkpoint of the step just done, unless it is there."""
    path = folder / "checkpoints" / checkpoint_name(module.windows_done)
    if not path.exists():
        trainer.save_checkpoint(path)


def checkpoint_name(step: int) -> str:
    """The file of the checkpoint after a step."""
    return f"step-{step:08d}.ckpt"
