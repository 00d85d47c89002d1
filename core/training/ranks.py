"""Reductions over ranks, and the context in which they train.

Data ranks read other sequences and have the same layers. They are all ranks, unless a strategy says which ones are
(`set_data_group`). Sums and maxima of what a step counted are over the data ranks; agreements about the run itself, on
signals and texts, are over all ranks. Every reduction returns its argument unchanged where there is one rank.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from core.training.launchers import JOINED, Launch, without_launcher


def set_rank(launch: Launch) -> None:
    """Makes this process the rank that it was started as; Lightning reads one from a launcher's variables."""
    rank_zero_only.rank = launch.rank  # type: ignore[attr-defined]


def is_rank_zero() -> bool:
    """Whether this process is the first rank, which alone writes and prints; known before any process group exists."""
    return not getattr(rank_zero_only, "rank", 0)


@contextmanager
def process_group_scope(folder: Path, launch: Launch) -> Iterator[None]:
    """A context in which ranks may be started; afterwards the process group is closed and the environment restored."""
    before = dict(os.environ)
    alone = not dist.is_initialized()
    for name in before.keys() - without_launcher(before, launch).keys():
        del os.environ[name]
    os.environ[JOINED] = str(folder.resolve())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        set_data_group(None)
        if alone and dist.is_initialized():
            dist.destroy_process_group()


_data_group: "dist.ProcessGroup | None" = None
"""The data ranks of this process; None: all ranks."""


def set_data_group(group: "dist.ProcessGroup | None") -> None:
    """Says which ranks are the data ranks of this process; None: all are."""
    global _data_group
    _data_group = group


def data_group() -> "dist.ProcessGroup | None":
    """The data ranks of this process; None: all ranks."""
    return _data_group


def all_ranks() -> tuple[int, int]:
    """The rank of this process among all of the run, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rank_and_world() -> tuple[int, int]:
    """The rank of this process among the data ranks, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(_data_group), dist.get_world_size(_data_group)
    return 0, 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over the data ranks, exact for integers, without a gradient."""
    if rank_and_world()[1] == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed, group=_data_group)
    return summed


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The maximum over the data ranks, element by element, without a gradient."""
    if rank_and_world()[1] == 1:
        return tensor
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_data_group)
    return largest


class _Sum(torch.autograd.Function):
    """A sum over ranks that passes its gradient on to every rank's own part unchanged.

    Every rank computes the same loss from the same sum, so adding the ranks' gradients gives the whole one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of an integer over all ranks, whichever of them read the same data."""
    if all_ranks()[1] == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def broadcast_int(value: int, device: torch.device) -> int:
    """The integer of the first rank, on every rank."""
    if all_ranks()[1] == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.broadcast(tensor, 0)
    return int(tensor)


def first_text_over_ranks(text: str | None) -> str | None:
    """The text of the first rank that has one, on every rank; None if none has one."""
    if all_ranks()[1] == 1:
        return text
    texts: list[str | None] = [None] * all_ranks()[1]
    dist.all_gather_object(texts, text)
    for found in texts:
        if found is not None:
            return found
    return None


def all_reduce_max_(tensors: Sequence[Tensor]) -> None:
    """Replaces every element of some fp32 tensors by its maximum over the ranks, in place, by one exchange."""
    if all_ranks()[1] == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def differentiable_all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over the data ranks, differentiable."""
    if rank_and_world()[1] == 1:
        return tensor
    result: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return result
