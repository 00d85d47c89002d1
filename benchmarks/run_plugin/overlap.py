"""How much of the exchange between ranks computation covers, from the intervals that torch's profiler recorded.

`overlap_of` is the only place that reads a profile.
"""

from collections.abc import Iterable
from typing import Any

import torch

Interval = tuple[int, int]
"""Begin and end, in nanoseconds."""

EXCHANGE = ("nccl", "gloo:")
"""Beginnings of the names of kernels, or of operations on a CPU, that move data between ranks."""


def overlap_of(profiler: Any, device: str) -> dict[str, float]:
    """The seconds of exchange and of computation, and the share of the exchange during which computation ran too.

    Args:
        profiler: one of torch that has stopped.
        device: cuda: kernels are read; cpu: operations, which are a thread's time and include waiting.
    """
    exchange: list[Interval] = []
    computation: list[Interval] = []
    on_gpu = device == "cuda"
    for event in profiler.profiler.kineto_results.events():
        name = event.name().lower()
        if on_gpu != (event.device_type() == torch.autograd.DeviceType.CUDA):
            continue
        if name.startswith(("memcpy", "memset")):
            continue
        interval = (event.start_ns(), event.start_ns() + event.duration_ns())
        if name.startswith(EXCHANGE):
            exchange.append(interval)
        elif on_gpu or name.startswith("aten::"):
            computation.append(interval)
    return shares(exchange, computation)


def shares(exchange: Iterable[Interval], computation: Iterable[Interval]) -> dict[str, float]:
    """Seconds of both, of both at once, and the share of the exchange that is covered; 0 without any exchange."""
    moved = merged(exchange)
    computed = merged(computation)
    both = length(merged(moved + computed))
    covered = length(moved) + length(computed) - both
    return {
        "exchange_seconds": length(moved) / 1e9,
        "computation_seconds": length(computed) / 1e9,
        "covered_seconds": covered / 1e9,
        "covered_share": covered / max(length(moved), 1),
    }


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as intervals that do not touch each other, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def length(intervals: Iterable[Interval]) -> int:
    """The nanoseconds of intervals that do not touch each other."""
    return sum(end - begin for begin, end in intervals)
