"""Sums over the data ranks: the identity where there is one."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, differentiable."""
    if rank_and_world()[1] == 1:
        return tensor
    result: Tensor = _Sum.apply(tensor)
    return result
