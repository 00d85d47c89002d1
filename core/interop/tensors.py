"""Tensors that are read a few rows at a time, wherever they lie.

Rows: every dimension but the last counts them; a vector is one row. A matrix in FP8 blocks stands beside its scales:
`X.weight` holds codes, `X.weight_scale` one fp32 scale for each row and each 128 columns. Scales by row instead of by
block cost 3 % and let rows be stacked, split and reordered like any others.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Rows and columns that share a scale in the FP8 form."""

SCALE = "_scale"
"""Ends the name of a matrix's scales."""

CODES = torch.float8_e4m3fn
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""Formats that weights can be converted to, by the names of our precisions."""

CHUNK = 64 * 2**20
"""Bytes of a tensor that are held at once."""


@dataclass(frozen=True)
class Kind:
    """A tensor's number format and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all."""
        return self.rows * self.row_bytes


class Tensors(ABC):
    """Named tensors: what they are, and their rows."""

    kinds: Mapping[str, Kind]

    @abstractmethod
    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows begin to end, in the format that they are kept in."""

    def values(self, name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows begin to end as numbers: FP8 codes times their scales."""
        rows = self.rows(name, begin, end)
        if rows.dtype == CODES and dtype != CODES:
            scales = self.rows(name + SCALE, begin, end)
            rows = dequantised(rows, scales, dtype if dtype == torch.float64 else torch.float32)
        return rows.to(dtype)


class Loaded(Tensors):
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.kinds = {name: Kind(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """A view."""
        kind = self.kinds[name]
        return self._tensors[name].detach().reshape(kind.rows, kind.width)[begin:end]


def chunks(kind: Kind, begin: int, end: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit in memory together, each but the last a multiple of `step` long."""
    length = max(1, CHUNK // max(1, kind.row_bytes * step)) * step
    for start in range(begin, end, length):
        yield start, min(start + length, end)


def scale_kind(kind: Kind) -> Kind:
    """What the scales of a matrix are."""
    return Kind(torch.float32, (*kind.shape[:-1], math.ceil(kind.width / BLOCK)))


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [n, width] times their rows' scales [n, width / 128, rounded up]."""
    wide = scales.to(dtype).repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
    return codes.to(dtype) * wide


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales by row of whole blocks of rows (the last may be short), the largest of each block at 448.

    Codes are what the cast gives, the sign of a zero included, as the released kernels write them; what trains
    (`core.numerics.quantise`) has no use for that sign. A block of zeros has scale 1. What is not finite has no code:
    the caller asks first.
    """
    rows, width = values.shape
    padded = values.new_zeros(math.ceil(rows / BLOCK) * BLOCK, math.ceil(width / BLOCK) * BLOCK, dtype=torch.float32)
    padded[:rows, :width] = values
    blocks = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    limit = torch.finfo(CODES).max
    scale = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    codes = (blocks / scale[:, None, :, None]).clamp(-limit, limit).to(CODES)
    return codes.view_as(padded)[:rows, :width], scale.repeat_interleave(BLOCK, dim=0)[:rows]
