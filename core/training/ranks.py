"""Sums and maxima over data ranks, the identity where there is one; and how several ranks share one run folder."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

JOINED = "MOELOOM_JOINED_RUN"
"""The environment variable in which the first rank tells those that it starts which run folder is theirs."""


def leads() -> bool:
    """Whether this process is the first rank, which alone writes and speaks; known before any group is there."""
    return not getattr(rank_zero_only, "rank", 0)


def joined_folder() -> Path | None:
    """The run folder of the rank that started this one; None where nobody did."""
    told = os.environ.get(JOINED)
    return Path(told) if told and not leads() else None


@contextmanager
def one_group(folder: Path) -> Iterator[None]:
    """The time in which ranks may be started; afterwards this process is alone again, and so is its environment."""
    before, alone = dict(os.environ), not dist.is_initialized()
    os.environ[JOINED] = str(folder.resolve())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if alone and dist.is_initialized():
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process among the data ranks, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def total(tensor: Tensor) -> Tensor:
    """The sum over ranks, exact for integers, without a gradient."""
    if rank_and_world()[1] == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The maximum over ranks, element by element, without a gradient."""
    if rank_and_world()[1] == 1:
        return tensor
    found = tensor.detach().clone()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found


class _Sum(torch.autograd.Function):
    """A sum over ranks whose gradient is handed to every rank's own part as it is.

    Every rank then holds the same loss of the same sum, and adding the ranks' gradients gives the whole one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    if rank_and_world()[1] == 1:
        return value
    held = torch.tensor(value, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)


def share_largest(tensors: Sequence[Tensor]) -> None:
    """Put the largest over ranks into every element of some fp32 tensors, by one exchange."""
    if rank_and_world()[1] == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, differentiable."""
    if rank_and_world()[1] == 1:
        return tensor
    result: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return result
