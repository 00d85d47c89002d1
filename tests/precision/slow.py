"""FP8 straight from the definitions: formats as lists, tiles as loops, products in fp64; nothing here is fast."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

Groups = Sequence[tuple[int, int]]
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e5m6": 65024.0}
BITS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15), "e5m6": (5, 6, 15)}
"""Exponent bits, mantissa bits, bias."""


@cache
def numbers(form: str) -> list[float]:
    """Every non-negative number of a format in the order of its codes, up to the largest that is one."""
    exponents, mantissas, bias = BITS[form]
    found = []
    for exponent in range(2**exponents):
        for mantissa in range(2**mantissas):
            fraction = mantissa / 2**mantissas
            value = (
                fraction * 2.0 ** (1 - bias)
                if exponent == 0
                else (1 + fraction) * 2.0 ** (exponent - bias)
            )
            if value <= LARGEST[form]:
                found.append(value)
    return found


def nearest(value: float, form: str) -> float:
    """The nearest number of a format, the even code where two are as near; beyond the largest it is the largest."""
    if value != value:
        return value
    grid, size = numbers(form), abs(value)
    above = bisect_left(grid, size)
    if above == len(grid):
        return grid[-1] if value > 0 else -grid[-1]
    if above == 0 or grid[above] == size:
        code = above
    else:
        down, up = size - grid[above - 1], grid[above] - size
        code = above - 1 if down < up or (down == up and (above - 1) % 2 == 0) else above
    return grid[code] if value > 0 else -grid[code]


def scale_of(tile: np.ndarray, form: str, power_of_two: bool) -> np.float32:
    """fp32: amax / largest; the next power of two; NaN if anything is not finite; never below the smallest normal."""
    if not np.isfinite(tile).all():
        return np.float32(np.nan)
    scale = np.float32(np.abs(tile).max(initial=0)) / np.float32(LARGEST[form])
    scale = max(scale, np.finfo(np.float32).tiny)
    return (
        np.float32(2.0 ** int(np.ceil(np.log2(np.float64(scale)))))
        if power_of_two
        else np.float32(scale)
    )


def quantised(
    x: Tensor,
    rows: int,
    columns: int,
    form: str = "e4m3",
    *,
    power_of_two: bool = False,
    groups: Groups | None = None,
    amax: float | None = None,
) -> tuple[Tensor, list[list[float]]]:
    """code * scale in fp64, and the scales, a row for each row of tiles.

    Args:
        rows, columns: size of a tile; 0: all.
        groups: spans of rows at whose first one tiles start anew; rows of none are 0.
        amax: taken instead of every tile's own.
    """
    values = x.detach().to(torch.float32).numpy()
    height, width = values.shape
    result, scales = np.zeros((height, width)), []
    for begin, end in groups if groups is not None else [(0, height)]:
        for top in range(begin, end, rows or max(end - begin, 1)):
            line = []
            for left in range(0, width, columns or max(width, 1)):
                part = (
                    slice(top, min(top + (rows or height), end)),
                    slice(left, left + (columns or width)),
                )
                tile = values[part]
                scale = scale_of(
                    tile if amax is None else np.array([amax], np.float32), form, power_of_two
                )
                line.append(float(scale))
                with np.errstate(all="ignore"):
                    shifted = tile / scale
                codes = [[nearest(float(v), form) for v in row] for row in shifted]
                result[part] = np.array(codes).reshape(tile.shape) * np.float64(scale)
            scales.append(line)
    return torch.from_numpy(result), scales


def spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    """First and past the last row of every group."""
    return list(zip([0, *ends[:-1]], ends, strict=True))


def calc_diff(one: Tensor, two: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) in fp64, as DeepGEMM's tests take it."""
    one, two = one.double(), two.double()
    return float(1 - 2 * (one * two).sum() / (one.square() + two.square()).sum())
