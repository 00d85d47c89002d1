"""The summary of a finished run: what it measured, under the names that `summary.json` promises."""

import math
import resource
import sys
from typing import Any

import torch

from core.analysis.size import Size
from core.data.module import TextData
from core.training.module import TrainingModule
from core.training.setup import Watchers


def summarise(
    module: TrainingModule, data: TextData, size: Size, watchers: Watchers, notices: list[str]
) -> dict[str, Any]:
    """The run's results under the names that `summary.json` promises; null where something was not measured."""
    values = module.validated
    acceptance = next((v for name, v in values.items() if name.endswith("acceptance_1")), None)
    tokens = module.plan.progress(module.windows_done - 1).tokens
    rate = tokens / module.seconds if module.seconds else None
    peak, recent = watchers.throughput.available_flops, watchers.loads.recent
    results = {
        "steps": module.windows_done,
        "tokens": tokens,
        "wall_seconds": module.wall_seconds,
        "train_seconds": module.seconds,
        "tokens_per_second": rate,
        "mfu": rate * size.flops_per_token / (peak * module.trainer.world_size) if rate and peak else None,
        "peak_flops": peak,
        "val_loss": values.get("val_loss"),
        "val_bits_per_byte": values.get("val_bits_per_byte"),
        "max_vio_global": values.get("val_max_vio_global"),
        "max_vio_batch": sum(recent) / len(recent) if recent else None,
        "dropped_fraction": module.dropped_fraction(),
        "mtp_acceptance": acceptance,
        "params_total": size.params_total,
        "params_mtp": size.params_heads,
        "params_active": size.params_active,
        "flops_per_token": size.flops_per_token,
        "peak_memory_bytes": peak_memory_bytes(),
        "skipped_steps": module.skipped_steps,
        "validation_bytes": data.validation_bytes,
        "threads": torch.get_num_threads(),
        "precision_paths": module.model.paths().table(),
        "notices": notices,
    }
    return finite(results)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with null for what is no number: JSON has neither infinities nor NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def peak_memory_bytes() -> int:
    """The most memory this process held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
