"""Finds numbers that are not finite, at about the speed of reading them.

`torch.isfinite` makes several copies of a tensor. The smallest and the largest number do not, and each is NaN if any
number is, so a tensor without such numbers is recognised in one pass.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FIRST_SPECIAL_CODE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""Formats of 8 bits: the smallest positive code that is not a finite number."""


def is_finite(x: Tensor) -> bool:
    """Whether every number of a tensor is finite; FP8 tensors are judged by their codes."""
    if not x.numel() or not x.is_floating_point():
        return True
    if x.dtype in FIRST_SPECIAL_CODE:
        first = FIRST_SPECIAL_CODE[x.dtype]
        largest_positive = int(x.view(torch.int8).max())
        largest_negative = int(x.view(torch.uint8).max()) - 0x80
        return max(largest_positive, largest_negative) < first
    low, high = torch.aminmax(x)
    return bool(low.isfinite() & high.isfinite())


def holds_nan(x: Tensor) -> bool:
    """Whether a tensor holds a NaN; infinities are allowed."""
    if not x.numel() or not x.is_floating_point():
        return False
    if x.dtype in FIRST_SPECIAL_CODE:
        return bool(x.float().isnan().any())
    return bool(torch.aminmax(x).max.isnan())


def first_not_finite(x: Tensor) -> tuple[int, ...] | None:
    """Returns the index of the first number that is not finite, in the order of rows; None if all are finite."""
    if is_finite(x):
        return None
    wide = x.float() if x.dtype in FIRST_SPECIAL_CODE else x
    place = (~wide.isfinite()).flatten().nonzero()[0]
    return tuple(int(i) for i in torch.unravel_index(place[0], x.shape))


def at(value: float, index: tuple[int, ...]) -> str:
    """Words a number and its place for an error message, for example `nan at [3, 17]`."""
    return f"{value} at {list(index)}"


def not_finite_in(tensors: Mapping[str, object]) -> str | None:
    """Returns `tensor NAME holds a number that is not finite (nan at [3, 17])` for the first such tensor, or None.

    Values that are not tensors of floating-point numbers, and tensors on the meta device, are passed over.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            continue
        index = first_not_finite(tensor)
        if index is not None:
            value = float(tensor[index])
            return f"tensor {name} holds a number that is not finite ({at(value, index)})"
    return None
