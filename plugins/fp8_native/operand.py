"""One product a b^T of FP8 operands by `torch.nn.functional.scaled_mm`, in the shapes and layouts that it asks for.

Both operands are [rows, K] with the contraction along their rows, as tensor cores want them. What torch's CUDA
implementation checks and cuBLAS's documentation of block scaling adds, for M rows of a and N of b:

- K and N are multiples of 16. Here K is padded with zeros to whole tiles of 128, M and N to 16;
- 1x128 scales are [rows, K / 128] with strides (1, rows): outer dimension first in memory;
- 128x128 scales are [L, rows / 128] with strides (1, L), L being K / 128 rounded up to a multiple of 4;
- two 128x128 operands are refused, which no product of a layer needs;
- codes and scales begin at multiples of 16 bytes: where one expert's scale stood among the others', cuBLAS had no
  algorithm.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from core.numerics.quantise import BLOCK, ROW, WHOLE, Quantised, Tile

WIDTH, ROWS, SCALES = 128, 16, 4
"""Multiples: of K, of rows, and of the scales along K of an operand in 128x128 blocks."""

CHANNEL = Tile(1, 0)
"""A scale for each row."""

KINDS = {ROW: ScalingType.BlockWise1x128, BLOCK: ScalingType.BlockWise128x128}
KINDS |= {CHANNEL: ScalingType.RowWise, WHOLE: ScalingType.TensorWise}
RECIPES = {tile: [kind.value] for tile, kind in KINDS.items()}


@dataclass(frozen=True)
class Operand:
    """A matrix whose rows are contracted with another's.

    Args:
        codes: FP8 [rows, K].
        scales: fp32 [tiles down, tiles along K].
        tile: `ROW`, `BLOCK`, `CHANNEL` or `WHOLE`.
    """

    codes: Tensor
    scales: Tensor
    tile: Tile

    @classmethod
    def of(cls, quantised: Quantised) -> "Operand":
        """What `core.numerics.quantise.quantise` gave."""
        return cls(quantised.codes, quantised.scales, quantised.tile)

    def part(self, begin: int, end: int) -> "Operand":
        """Some of the rows; not of blocks."""
        assert self.tile != BLOCK, "rows of a block share a scale"
        scales = self.scales if self.tile == WHOLE else self.scales[begin:end]
        return Operand(self.codes[begin:end], scales, self.tile)

    def transposed(self) -> "Operand":
        """The matrix the other way round under the same scales; of blocks, or of a whole tensor."""
        assert self.tile in (BLOCK, WHOLE), "a scale for each row would become one along the contraction"
        return Operand(self.codes.t(), self.scales.t(), self.tile)


class Laid(NamedTuple):
    """An operand in the shape and layout that `scaled_mm` takes.

    Args:
        codes: FP8 [rows, K], both padded.
        scales: as the module says.
        recipe: number of the kind of scales, in a list.
    """

    codes: Tensor
    scales: Tensor
    recipe: list[int]


def multiply_into(y_MN: Tensor, a: Laid, b: Laid) -> None:
    """As `multiply`, into memory that is there: `F.scaled_mm`, of which this is what it calls, takes none."""
    torch._scaled_mm_v2(
        a.codes, b.codes.t(), [a.scales], a.recipe, [], [b.scales], b.recipe, [], None, y_MN.dtype, out=y_MN
    )


def multiply(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T, [M, N] in `dtype`, summed in fp32 with promotion (`use_fast_accum` off)."""
    m, n, k = len(a.codes), len(b.codes), a.codes.shape[1]
    if 0 in (m, n, k):  # CUDA returns zeros or nothing, the CPU NaN or an error
        return a.scales.new_zeros(m, n, dtype=dtype)
    y_MN: Tensor = F.scaled_mm(
        _padded(a.codes),
        _padded(b.codes).t(),
        _laid_out(a),
        KINDS[a.tile],
        _laid_out(b).t() if b.tile == CHANNEL else _laid_out(b),
        KINDS[b.tile],
        output_dtype=dtype,
        use_fast_accum=False,
    )
    return y_MN[:m, :n]


def _padded(codes: Tensor) -> Tensor:
    """Dense, with rows and columns of zeros up to whole multiples; bytes, because FP8 itself cannot be padded."""
    rows, columns = codes.shape
    padded = F.pad(codes.view(torch.uint8), (0, -columns % WIDTH, 0, -rows % ROWS)).contiguous()
    return padded.view(codes.dtype)


def _laid_out(operand: Operand) -> Tensor:
    """Scales of the padded operand, in fresh memory: aligned, and strides of axes of length 1 are right too."""
    scales, rows = operand.scales, len(operand.codes)
    if operand.tile == WHOLE:
        return scales.reshape(1).clone()
    down, across = scales.shape
    if operand.tile == BLOCK:
        block = scales.new_ones(down, across + -across % SCALES)
        block[:, :across] = scales
        return block.t()
    padded = rows + -rows % ROWS
    if operand.tile == CHANNEL:
        return torch.cat([scales, scales.new_ones(padded - rows, 1)]).view(padded, 1)
    laid = scales.new_ones(across, padded)
    laid[:, :rows] = scales.t()
    return laid.t()
