"""How much of the exchange between ranks computation covers, from what torch's profiler recorded.

Computation is whatever a GPU does that is not NCCL's, copies included, as the callback `profiler` counts it.

`overlap_of` is the only place that reads a profile.
"""

from collections.abc import Iterable
from typing import Any

import torch

from plugins.profiler.spans import Span, intersection, length, union

EXCHANGE = ("nccl", "gloo:")
"""Beginnings of the names of kernels, or of operations on a CPU, that move data between ranks."""


def overlap_of(profiler: Any, device: str) -> dict[str, float]:
    """The seconds of exchange and of computation, and the share of the exchange during which computation ran too.

    Args:
        profiler: one of torch that has stopped.
        device: cuda: kernels are read; cpu: operations, which are a thread's time and include waiting.
    """
    exchange: list[Span] = []
    computation: list[Span] = []
    on_gpu = device == "cuda"
    for event in profiler.profiler.kineto_results.events():
        name = event.name().lower()
        if on_gpu != (event.device_type() == torch.autograd.DeviceType.CUDA):
            continue
        span = (event.start_ns(), event.start_ns() + event.duration_ns())
        if name.startswith(EXCHANGE):
            exchange.append(span)
        elif on_gpu or name.startswith("aten::"):
            computation.append(span)
    return shares(exchange, computation)


def shares(exchange: Iterable[Span], computation: Iterable[Span]) -> dict[str, float]:
    """Seconds of both, of both at once, and the share of the exchange that is covered; 0 without any exchange."""
    moved = union(exchange)
    computed = union(computation)
    covered = length(intersection(moved, computed))
    return {
        "exchange_seconds": length(moved) / 1e9,
        "computation_seconds": length(computed) / 1e9,
        "covered_seconds": covered / 1e9,
        "covered_share": covered / max(length(moved), 1),
    }
