"""Training speed, by Lightning's own monitor with this model's FLOPs and, on CPUs, a measured peak."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage

from core.training.module import TrainingModule


def measured_peak_flops(device: torch.device, seconds: float = 0.3, size: int = 1024) -> float:
    """The rate of fp32 matrix products on this machine, in FLOPs per second; the denominator of MFU on a CPU."""
    a = torch.randn(size, size, device=device)
    b = torch.randn(size, size, device=device)
    torch.mm(a, b)
    best = float("inf")
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


WINDOW = 5
"""The number of steps whose end times give the speed; the first rate is known after so many."""


class Throughput(ThroughputMonitor):
    """`tokens_per_second` and `mfu` over the last steps, in the step's row.

    Args:
        peak_flops: FLOPs per second of one device; None to use Lightning's table of GPUs.
    """

    def __init__(self, peak_flops: float | None) -> None:
        super().__init__(batch_size_fn=_tokens, window_size=WINDOW)
        self.peak_flops = peak_flops

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sets up Lightning's monitor, with the measured peak if its table has none."""
        super().setup(trainer, pl_module, stage)
        if not self.available_flops:
            self.available_flops = int(self.peak_flops) if self.peak_flops else None
        for throughput in self._throughputs.values():
            throughput.available_flops = self.available_flops

    def _compute(self, trainer: L.Trainer, iter_num: int | None = None) -> None:
        """Puts the rates into the step's row instead of one of their own."""
        if not trainer.training:
            return
        metrics = self._throughputs[RunningStage.TRAINING].compute()
        module = trainer.lightning_module
        assert isinstance(module, TrainingModule)
        if "device/samples_per_sec" in metrics:
            rate = metrics["device/samples_per_sec"] * trainer.world_size
            module.step_values["tokens_per_second"] = rate
            module.log("tokens_per_second", rate, logger=False, batch_size=1)
        if "device/mfu" in metrics:
            module.step_values["mfu"] = metrics["device/mfu"]


def _tokens(window: Any) -> int:
    """Tokens of one rank's window (or validation batch)."""
    batches = window if isinstance(window, list) else [window]
    return sum(int(batch.tokens_BL.numel()) for batch in batches)
