"""The memory and the utilisation of a GPU, beside the other numbers of a step."""

from typing import Any

import lightning as L
import torch


class GpuStatisticsCallback(L.Callback):
    """Adds columns to the row of every so many steps; it reads counters and waits for no kernel.

    `gpu/utilisation_percent` is left out where torch cannot read it, which needs the package `nvidia-ml-py`.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self._reads_utilisation = True

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Adds the numbers to the step's, which are written after this."""
        if pl_module.windows_done % self.every_steps == 0:
            pl_module.step_values.update(self.read(pl_module.device))

    def read(self, device: torch.device) -> dict[str, float]:
        """Bytes of memory and percent of utilisation; the peak is that of the whole run so far."""
        values = {
            "gpu/allocated_bytes": float(torch.cuda.memory_allocated(device)),
            "gpu/reserved_bytes": float(torch.cuda.memory_reserved(device)),
            "gpu/peak_allocated_bytes": float(torch.cuda.max_memory_allocated(device)),
        }
        if self._reads_utilisation:
            try:
                values["gpu/utilisation_percent"] = float(torch.cuda.utilization(device))
            except Exception:  # without NVML, or on a GPU without this counter
                self._reads_utilisation = False
        return values
