"""One product a b^T of FP8 operands by `torch.nn.functional.scaled_mm`, in the shapes and layouts that it needs.

Both operands are [rows, K] with the contraction along their rows, as tensor cores want them. What torch's CUDA
implementation checks and cuBLAS's documentation of block scaling adds, for M rows of a and N of b:

- K and N are multiples of 16. Here K is padded with zeros to whole tiles of 128, M and N to 16;
- 1x128 scales are [rows, K / 128] with strides (1, rows): outer dimension first in memory;
- 128x128 scales are [L, rows / 128] with strides (1, L), L being K / 128 rounded up to a multiple of 4;
- two 128x128 operands are not supported, and no product of a layer needs them;
- codes and scales begin at multiples of 16 bytes: cuBLAS has no algorithm for one expert's scale among the others'.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from core.numerics.quantise import BLOCK, ROW, WHOLE, Quantised, Tile

WIDTH = 128
ROWS = 16
SCALES = 4
"""Multiples: of K, of rows, and of the scales along K of an operand in 128x128 blocks."""

CHANNEL = Tile(1, 0)
"""The tile with a scale for each row."""

KINDS = {ROW: ScalingType.BlockWise1x128, BLOCK: ScalingType.BlockWise128x128}
KINDS |= {CHANNEL: ScalingType.RowWise, WHOLE: ScalingType.TensorWise}
RECIPES = {tile: [kind.value] for tile, kind in KINDS.items()}


@dataclass(frozen=True)
class Operand:
    """A matrix whose rows are contracted with another matrix's rows.

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
        """The operand of a result of `core.numerics.quantise.quantise`."""
        return cls(quantised.codes, quantised.scales, quantised.tile)

    def part(self, begin: int, end: int) -> "Operand":
        """The operand of the rows from `begin` to `end`; not for blocks."""
        assert self.tile != BLOCK, "rows of a block share a scale"
        scales = self.scales if self.tile == WHOLE else self.scales[begin:end]
        return Operand(self.codes[begin:end], scales, self.tile)

    def transposed(self) -> "Operand":
        """The transpose under the same scales; for blocks, or one scale for the tensor."""
        assert self.tile in (BLOCK, WHOLE), (
            "a scale for each row would become one along the contraction"
        )
        return Operand(self.codes.t(), self.scales.t(), self.tile)


class Laid(NamedTuple):
    """An operand in the shape and layout that `scaled_mm` takes.

    Args:
        codes: FP8 [rows, K], both padded.
        scales: fp32, laid out as the module's docstring says.
        recipe: number of the kind of scales, in a list.
    """

    codes: Tensor
    scales: Tensor
    recipe: list[int]


def multiply_into(y_MN: Tensor, a: Laid, b: Laid) -> None:
    """Writes a b^T into `y_MN`, by the function that `F.scaled_mm` calls and that, unlike it, takes an output."""
    torch._scaled_mm_v2(
        a.codes,
        b.codes.t(),
        [a.scales],
        a.recipe,
        [],
        [b.scales],
        b.recipe,
        [],
        None,
        y_MN.dtype,
        out=y_MN,
    )


def multiply(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T, [M, N] in `dtype`, summed in fp32 with promotion (`use_fast_accum` off)."""
    m = len(a.codes)
    n = len(b.codes)
    k = a.codes.shape[1]
    if 0 in (m, n, k):  # CUDA returns zeros or nothing, the CPU NaN or an error
        return a.scales.new_zeros(m, n, dtype=dtype)
    scales_b = _laid_out(b)
    if b.tile == CHANNEL:
        scales_b = scales_b.t()
    y_MN: Tensor = F.scaled_mm(
        _padded(a.codes),
        _padded(b.codes).t(),
        _laid_out(a),
        KINDS[a.tile],
        scales_b,
        KINDS[b.tile],
        output_dtype=dtype,
        use_fast_accum=False,
    )
    return y_MN[:m, :n]


def _padded(codes: Tensor) -> Tensor:
    """Dense codes, padded with zeros to whole multiples; padded as bytes, because FP8 itself cannot be."""
    rows, columns = codes.shape
    padded = F.pad(codes.view(torch.uint8), (0, -columns % WIDTH, 0, -rows % ROWS)).contiguous()
    return padded.view(codes.dtype)


def _laid_out(operand: Operand) -> Tensor:
    """The scales of the padded operand in new memory, aligned and with the right strides even on axes of length 1."""
    scales = operand.scales
    rows = len(operand.codes)
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
