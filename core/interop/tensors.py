"""Tensors that are read a few rows at a time, from memory or from files.

The rows of a tensor are counted over all dimensions but the last; a vector is one row. A matrix in FP8 blocks is stored
as two tensors: `X.weight` holds the codes, and `X.weight_scale` holds one fp32 scale for each row and each 128 columns.
Scales by row instead of by block cost 3 % more memory, and they can be stacked, split and reordered like other rows.
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
"""Suffix of the name of the tensor that holds a matrix's scales."""

CODES = torch.float8_e4m3fn
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
"""Number formats that weights can be converted to, by the names of our precisions."""

CHUNK = 64 * 2**20
"""Bytes of a tensor that are held in memory at once."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's number format and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of elements in a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return self.width * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.rows * self.row_bytes


class TensorReader(ABC):
    """Gives the specifications of named tensors, and their rows."""

    specs: Mapping[str, TensorSpec]

    @abstractmethod
    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Returns the rows from `begin` to `end`, in the format that they are stored in."""

    def values(self, name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Returns the rows from `begin` to `end` as numbers; FP8 codes are multiplied by their scales."""
        rows = self.read_rows(name, begin, end)
        if rows.dtype == CODES and dtype != CODES:
            scales = self.read_rows(name + SCALE, begin, end)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            rows = dequantised(rows, scales, wide)
        return rows.to(dtype)


class InMemoryTensors(TensorReader):
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.specs = {
            name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
        }

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Returns a view of the rows."""
        spec = self.specs[name]
        return self._tensors[name].detach().reshape(spec.rows, spec.width)[begin:end]


def chunks(spec: TensorSpec, begin: int, end: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows of at most `CHUNK` bytes; the length of each but the last is a multiple of `step`."""
    length = max(1, CHUNK // max(1, spec.row_bytes * step)) * step
    for start in range(begin, end, length):
        yield start, min(start + length, end)


def scale_spec(spec: TensorSpec) -> TensorSpec:
    """The specification of a matrix's scales."""
    return TensorSpec(torch.float32, (*spec.shape[:-1], math.ceil(spec.width / BLOCK)))


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies codes [n, width] by the scales [n, width / 128, rounded up] of their rows."""
    wide = scales.to(dtype).repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
    return codes.to(dtype) * wide


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises whole blocks of rows (the last may be short) so that the largest number of each block becomes 448.

    Codes are what the cast gives, the sign of a zero included, as the released kernels write them; the quantisation of
    training (`core.numerics.quantise`) does not keep that sign. A block of zeros has scale 1. Numbers that are not
    finite have no code: the caller must exclude them.

    Returns:
        Codes [n, width], and scales by row [n, width / 128, rounded up].
    """
    rows, width = values.shape
    full_rows = math.ceil(rows / BLOCK) * BLOCK
    full_width = math.ceil(width / BLOCK) * BLOCK
    padded = values.new_zeros(full_rows, full_width, dtype=torch.float32)
    padded[:rows, :width] = values
    blocks = padded.view(-1, BLOCK, full_width // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    limit = torch.finfo(CODES).max
    scale = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    codes = (blocks / scale[:, None, :, None]).clamp(-limit, limit).to(CODES)
    scale_by_row = scale.repeat_interleave(BLOCK, dim=0)
    return codes.view_as(padded)[:rows, :width], scale_by_row[:rows]
