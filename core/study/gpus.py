"""Several runs on each GPU: which GPUs this process sees, and whether a sweep's runs can share them."""

import os

from core.contracts.errors import UserError
from core.study.results import CLOCK
from core.study.sweep_file import Sweep

VARIABLE = "CUDA_VISIBLE_DEVICES"
"""The environment variable that limits the GPUs of a process; the first one that it names is its GPU 0."""


def visible_gpus() -> list[str]:
    """The GPUs of this process, each by the name that selects it for another process; empty without a GPU.

    The names are those in `CUDA_VISIBLE_DEVICES` (indices, or UUIDs of GPUs and their parts), else indices.
    """
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get(VARIABLE)
    if given is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in given.split(",")][:count]


def gpu_slots(sweep: Sweep, per_gpu: int) -> list[str]:
    """The GPU of each slot: every GPU `per_gpu` times, in turn, so that few runs have a GPU of their own.

    Raises:
        UserError: there is no GPU, a run does not train on exactly one, or the metric is a time.
    """
    where = f"--per-gpu {per_gpu}"
    gpus = visible_gpus()
    if not gpus:
        raise UserError(
            f"{where}: this machine has no GPU that torch can use; share cores with --workers"
        )
    for variant in sweep.variants:
        strategy = variant.recipe.strategy
        ranks = max(1, strategy.component.ranks_of(strategy.config))
        if ranks > 1:
            raise UserError(
                f"{where}: {variant.name} trains on {ranks} ranks, and a run gets one GPU"
            )
        if getattr(strategy.config, "accelerator", "cpu") == "cpu":
            raise UserError(
                f"{where}: {variant.name} trains on the CPU (strategy.accelerator = 'cpu')"
            )
    if per_gpu > 1 and sweep.schema.metric in CLOCK:
        why = "runs that share a GPU slow each other down"
        raise UserError(f"{where}: metric = {sweep.schema.metric!r} cannot be compared: {why}")
    return gpus * per_gpu
