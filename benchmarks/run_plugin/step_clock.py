"""The time, memory and loss of every step of a run, by rank, and a profile of its last steps."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contracts.schema import setting
from core.contracts.training import CallbackFactory

if TYPE_CHECKING:
    from lightning.pytorch import Callback

KEPT = ("loss/", "load/", "exchange/", "grad_norm", "lr")
"""The numbers of a step that are written beside its time, by the beginnings of their names."""


class StepClock(CallbackFactory):
    """Writes `steps-RANK.jsonl`, a line when training begins and one for each step, and `profile-RANK.json`."""

    example = {"name": "step_clock"}

    @dataclass(kw_only=True)
    class Config:
        """What is profiled."""

        profiled_steps: int = setting(0, doc="the last steps, which torch's profiler records")

    def make(self, folder: Path) -> "Callback":
        """Makes the callback."""
        return make_clock(folder, self.config.profiled_steps)


def make_clock(folder: Path, profiled_steps: int) -> "Callback":
    """The callback; this function imports torch and Lightning."""
    import lightning as L
    import torch

    from benchmarks.run_plugin.overlap import overlap_of
    from core.run.summary import peak_memory_bytes
    from core.training.module import TrainingModule
    from core.training.ranks import rank_and_world
    from core.training.step_metrics import as_scalar

    class Clock(L.Callback):
        """Times steps from an idle device to an idle device; losses are read after the clock has stopped."""

        def __init__(self) -> None:
            self.marks: dict[str, float] = {"callbacks_made": time.time()}
            self.began = 0.0
            self.began_cpu = 0.0
            self.profiler: Any = None

        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            """Notes when the ranks have met; weights are drawn afterwards."""
            self.marks["ranks_met"] = time.time()

        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            """Notes when weights and optimizers are made."""
            self.marks["model_ready"] = time.time()

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            """Writes the times of the start."""
            self.marks["training_begins"] = time.time()
            folder.mkdir(parents=True, exist_ok=True)
            self._file("steps", "jsonl").write_text(json.dumps(self.marks) + "\n")

        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            """Starts the clock, and the profiler before the last steps."""
            assert isinstance(pl_module, TrainingModule)
            left = pl_module.plan.steps - pl_module.windows_done
            if left == profiled_steps:
                self.profiler = _started_profiler(pl_module.device.type)
            _wait(pl_module.device.type)
            self.began = time.perf_counter()
            self.began_cpu = time.process_time()

        def on_train_batch_end(
            self,
            trainer: L.Trainer,
            pl_module: L.LightningModule,
            outputs: Any,
            batch: Any,
            batch_idx: int,
        ) -> None:
            """Writes the line of the step."""
            assert isinstance(pl_module, TrainingModule)
            device = pl_module.device.type
            _wait(device)
            line: dict[str, Any] = {
                "step": pl_module.windows_done,
                "seconds": time.perf_counter() - self.began,
                "cpu_seconds": time.process_time() - self.began_cpu,
                "at": time.time(),
                "profiled": self.profiler is not None,
                "peak_bytes": peak_memory_bytes(),
            }
            if device == "cuda":
                line["reserved_bytes"] = torch.cuda.max_memory_reserved()
            for name, value in pl_module.step_values.items():
                if name.startswith(KEPT):
                    line[name] = float(as_scalar(value))
            with self._file("steps", "jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            """Writes what the profiler has seen."""
            if self.profiler is None:
                return
            found: dict[str, Any] = {}
            try:
                self.profiler.stop()
                found = overlap_of(self.profiler, pl_module.device.type)
            except (
                RuntimeError
            ) as cause:  # the run's other results must not be lost with the profile
                found["error"] = str(cause)[:300]
            self._file("profile", "json").write_text(json.dumps(found))

        def _file(self, name: str, ending: str) -> Path:
            return folder / f"{name}-{rank_and_world()[0]}.{ending}"

    return Clock()


def _started_profiler(device: str) -> Any:
    """A profiler that records kernels of the GPU, or operations of the CPU."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    profiler = profile(activities=[activity])
    profiler.start()
    return profiler


def _wait(device: str) -> None:
    """Waits until the device has done its work."""
    import torch

    wait: Callable[[], None] = torch.cuda.synchronize
    if device == "cuda":
        wait()
