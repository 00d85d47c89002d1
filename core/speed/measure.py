"""Measures collectives on the ranks of a process group."""

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.speed.collectives import Collective, Kind, row

WARM_UP = 3
"""Repetitions that are not counted."""

FEWEST = 5
MOST = 50
"""Repetitions that are counted, as many as fit into the time for one collective."""

LARGEST = {"gloo": 64 * 2**20, "nccl": 2**30}
"""Bytes beyond which bandwidth hardly changes: no more are moved at once."""


def measure(
    collectives: Sequence[Collective], device: torch.device, *, seconds: float = 1.0
) -> list[dict[str, Any]]:
    """The bandwidth of some collectives; every rank calls this, and all return the same rows.

    Args:
        collectives: what to measure.
        device: this rank's device.
        seconds: the time for one collective, about.
    """
    backend = dist.get_backend()
    found = []
    for collective in collectives:
        group = _group_of(collective.ranks)
        size = min(collective.bytes, LARGEST.get(backend, LARGEST["gloo"]))
        sent, received = _tensors(collective.what, size, collective.ranks, device)
        times = _times(collective.what, sent, received, group, seconds)
        moved = max(sent.nbytes, received.nbytes)
        found.append(row(collective, moved, backend, times))
    return found


def _group_of(ranks: int) -> Any:
    """The group of consecutive ranks to which this one belongs; all groups are made, since every rank has to."""
    if ranks == dist.get_world_size():
        return dist.group.WORLD
    own = None
    for first in range(0, dist.get_world_size(), ranks):
        group = dist.new_group(list(range(first, first + ranks)))
        if first <= dist.get_rank() < first + ranks:
            own = group
    return own


def _tensors(what: Kind, size: int, ranks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a rank sends and receives, in fp32; sizes are rounded up to equal parts."""
    part = max(1, -(-size // (4 * ranks)))
    sent = torch.ones(part * ranks, device=device)
    if what == "all_reduce":
        return sent, sent
    if what == "all_gather":
        return sent[:part].clone(), torch.empty_like(sent)
    if what == "reduce_scatter":
        return sent, torch.empty_like(sent[:part])
    return sent, torch.empty_like(sent)


def _run(what: Kind, sent: Tensor, received: Tensor, group: Any) -> None:
    if what == "all_reduce":
        dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=group)
    elif what == "all_gather":
        dist.all_gather_into_tensor(received, sent, group=group)
    elif what == "reduce_scatter":
        dist.reduce_scatter_tensor(received, sent, group=group)
    else:
        dist.all_to_all_single(received, sent, group=group)


def _times(what: Kind, sent: Tensor, received: Tensor, group: Any, seconds: float) -> list[float]:
    """Seconds of each repetition on the slowest rank, which begins when all ranks are ready."""
    warmed = [_once(what, sent, received, group) for _ in range(WARM_UP)]
    slowest = _slowest(warmed, sent.device)[-1]
    count = min(MOST, max(FEWEST, int(seconds / max(slowest, 1e-9))))
    times = [_once(what, sent, received, group) for _ in range(count)]
    return _slowest(times, sent.device)


def _once(what: Kind, sent: Tensor, received: Tensor, group: Any) -> float:
    _wait_for(sent.device)
    dist.barrier()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer names, which older versions lack
        _run(what, sent, received, group)
    _wait_for(sent.device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(times: list[float], device: torch.device) -> list[float]:
    """The largest time of each repetition over all ranks."""
    largest = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return list(largest.tolist())
