"""Counting in integers, the same on every device and in every order."""

import torch
from torch import Tensor


def count(index_A: Tensor, size: int, counted_A: Tensor | None = None) -> Tensor:
    """Counts how often each of the numbers 0 ... size - 1 occurs in a list: int64, [size].

    On a GPU the list is sorted and searched. `index_add` adds entries one by one, so those that share a counter wait
    for each other, and its compiled form takes milliseconds.

    Args:
        index_A: int64 in [0, size).
        size: how many counters there are.
        counted_A: bool, whether each entry counts; None: all do.
    """
    if not index_A.is_cuda:
        if counted_A is None:
            ones_A = torch.ones_like(index_A)
        else:
            ones_A = counted_A.to(torch.int64)
        return torch.zeros(size, dtype=torch.int64, device=index_A.device).index_add(
            0, index_A, ones_A
        )
    if counted_A is not None:
        index_A = index_A.masked_fill(~counted_A, size)
    return ends_of(index_A.sort().values, size).diff(prepend=index_A.new_zeros(1))


def ends_of(sorted_A: Tensor, size: int) -> Tensor:
    """The index at which each number's entries end in a sorted list: int64, [size].

    Numbers of `size` and more come after the last end.
    """
    return torch.searchsorted(sorted_A, torch.arange(size, device=sorted_A.device), right=True)
