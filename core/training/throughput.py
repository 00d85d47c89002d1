"""Training speed, by Lightning's own monitor with this model's FLOPs and a peak from its table or a measurement."""

import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage

from core.contracts.precision import Precision
from core.training.module import TrainingModule


def measured_peak_flops(
    device: torch.device,
    seconds: float = 0.3,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """The rate of matrix products on this machine, in FLOPs per second.

    Args:
        device: a CPU or a GPU.
        seconds: how long to measure.
        size: rows and columns of the matrices; by default 1024 on a CPU and 4096 on a GPU.
        dtype: their format.
    """
    is_cpu = device.type == "cpu"
    if size is None:
        size = 1024 if is_cpu else 4096
    # A GPU is asked for several products at once, so that waiting for it costs little.
    together = 1 if is_cpu else 20
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    product = torch.mm(a, b)
    best = float("inf")
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(together):
            torch.mm(a, b, out=product)
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 * together / best


def _wait_for(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str | None]:
    """The FLOPs per second that MFU refers to, and where the number is from.

    Args:
        device: the device of one rank.
        dtype: the format in which the products of the recipe run. On CPUs the rate of fp32 is meant, and for formats
            of 8 bits that of bf16, to which the report's utilisation refers too.

    Returns:
        The rate, and `table` for Lightning's table of GPUs or `measured`; two None on a device that has no rate.
    """
    if device.type == "cpu":
        dtype = torch.float32
    elif dtype.itemsize == 1:
        dtype = torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a device that is not in the table is measured
        known = get_available_flops(device, dtype)
    if known:
        return float(known), "table"
    if device.type not in ("cpu", "cuda"):
        return None, None
    rate = measured_peak_flops(device, dtype=dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the matrices are not part of the run
    return rate, "measured"


WINDOW = 5
"""The number of steps whose end times give the speed; the first rate is known after so many."""


class Throughput(ThroughputMonitor):
    """`tokens_per_second` and `mfu` over the last steps, in the step's row.

    Args:
        peak_flops: measured FLOPs per second of one device; None to look them up or to measure them.
    """

    def __init__(self, peak_flops: float | None) -> None:
        super().__init__(batch_size_fn=_tokens, window_size=WINDOW)
        self.peak_flops = peak_flops
        self.peak_source: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sets up Lightning's monitor with a peak for the format of the model's products."""
        assert isinstance(pl_module, TrainingModule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().setup(trainer, pl_module, stage)
        peak, self.peak_source = self.peak_flops, "measured"
        if peak is None:
            precision = pl_module.model.blocks[0].precision
            assert isinstance(precision, Precision)
            dtype = precision.compute_dtype("ffn.down")
            peak, self.peak_source = peak_of(trainer.strategy.root_device, dtype)
        self.available_flops = int(peak) if peak else None
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
            if module.reports_to_callbacks:
                module.log("tokens_per_second", rate, logger=False, batch_size=1)
        if "device/mfu" in metrics:
            module.step_values["mfu"] = metrics["device/mfu"]


def _tokens(window: Any) -> int:
    """Tokens of one rank's window (or validation batch)."""
    batches = window if isinstance(window, list) else [window]
    return sum(int(batch.tokens_BL.numel()) for batch in batches)
