"""A slow reference of tensor cores that keep few bits of a sum (report, section 3.3.2, figure 7b).

The model of the hardware: codes are multiplied exactly. Every 32 products are added to an accumulator at once. All of
them, the accumulator too, are first shifted to the largest exponent among them, and bits below the `bits` significant
ones are cut off. After each `every` elements the accumulator is multiplied by the scales, added to an fp32 sum and
emptied: the promotion to CUDA cores. Without promotion there is one accumulator for the whole sum, which allows one
scale only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.numerics.number_formats import E4M3, Format, decode
from core.numerics.quantise import Quantised, Tile, scaled, spread
from core.numerics.quantised_product import Kept
from plugins.fp8_emulated.rounding import EmulatedRounding

AT_ONCE = 32
"""Products that one instruction adds: the depth of Hopper's FP8 matrix instruction."""
MOST_PRODUCTS = 1 << 22
"""Products that are held in memory at a time."""


@dataclass(frozen=True)
class Scaled:
    """An operand as the hardware gets it: numbers on the format's grid and the scale of each, both [..., R, C]."""

    grid: Tensor
    scales: Tensor

    def t(self) -> "Scaled":
        """The transpose of the last two axes."""
        return Scaled(self.grid.transpose(-2, -1), self.scales.transpose(-2, -1))

    def __getitem__(self, index: Any) -> "Scaled":
        return Scaled(self.grid[index], self.scales[index])


@dataclass(frozen=True, kw_only=True)
class NarrowRounding(EmulatedRounding):
    """`EmulatedRounding` whose products are summed in an accumulator of few bits.

    Args:
        bits: significant bits that the accumulator keeps.
        every: elements after which it is promoted; None: never.
    """

    bits: int
    every: int | None

    def operand(
        self,
        x: Tensor,
        tile: Tile,
        form: Format,
        which: str,
        ends_E: Tensor | None = None,
        *,
        power_of_two: bool = False,
    ) -> Scaled:
        """The numbers of x on the grid, and their scales."""
        power_of_two = power_of_two or self.power_of_two
        amax = self._known_amax(which)
        grid, scales = scaled(x, tile, form, power_of_two=power_of_two, ends_E=ends_E, amax=amax)
        return Scaled(grid, scales)

    def operand_of(self, stored: Quantised) -> Scaled:
        """The operand that stored codes represent."""
        grid = decode(stored.codes, stored.form)
        return Scaled(grid, spread(stored.scales, grid, stored.tile))

    def operand_and_codes(self, x: Tensor, tile: Tile, which: str) -> tuple[Scaled, Kept]:
        """The operand, and the E4M3 codes and scales that are saved."""
        _, kept = super().operand_and_codes(x, tile, which)
        codes, scales = kept
        return self.operand_of(Quantised(codes, scales, tile, E4M3, x.shape[-1])), kept

    def product(self, rows: Scaled, weight: Scaled, ends_E: Tensor | None) -> Tensor:
        """rows @ weight^T, [A, out]."""
        if ends_E is None:
            return accumulated(rows, weight, bits=self.bits, every=self.every)
        y_AO = rows.grid.new_zeros(len(rows.grid), weight.grid.shape[1])
        for expert, part in _spans(ends_E):
            y_AO[part] = accumulated(rows[part], weight[expert], bits=self.bits, every=self.every)
        return y_AO

    def product_back(self, rows: Scaled, weight: Scaled, ends_E: Tensor | None) -> Tensor:
        """rows @ weight, [A, in]."""
        return self.product(rows, weight.t(), ends_E)

    def outer(self, dy: Scaled, x: Scaled, ends_E: Tensor | None) -> Tensor:
        """dy^T x, [out, in], or [E, out, in] for the rows of each expert."""
        if ends_E is None:
            return accumulated(dy.t(), x.t(), bits=self.bits, every=self.every)
        dw_EOI = dy.grid.new_zeros(len(ends_E), dy.grid.shape[1], x.grid.shape[1])
        for expert, part in _spans(ends_E):
            dy_OA = dy[part].t()
            x_IA = x[part].t()
            dw_EOI[expert] = accumulated(dy_OA, x_IA, bits=self.bits, every=self.every)
        return dw_EOI


def _spans(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """The number of each expert, and the slice of its rows."""
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        yield expert, slice(begin, end)
        begin = end


def accumulated(a_MK: Scaled, b_NK: Scaled, *, bits: int, every: int | None) -> Tensor:
    """a b^T, [M, N] in fp32, through an accumulator that keeps `bits` bits and is promoted after `every` elements.

    Within `every` elements, all of K if None, a row's scale must not change.
    """
    rows = max(1, MOST_PRODUCTS // (AT_ONCE * max(1, len(b_NK.grid))))
    parts = []
    for start in range(0, len(a_MK.grid), rows):
        parts.append(_accumulated_rows(a_MK[start : start + rows], b_NK, bits, every))
    if parts:
        return torch.cat(parts)
    return a_MK.grid.new_zeros(0, len(b_NK.grid))


def _accumulated_rows(a_MK: Scaled, b_NK: Scaled, bits: int, every: int | None) -> Tensor:
    """`accumulated` for rows of a that fit into memory at once."""
    depth = a_MK.grid.shape[1]
    total_MN = a_MK.grid.new_zeros(len(a_MK.grid), len(b_NK.grid))
    for start in range(0, depth, every or max(depth, 1)):
        stop = min(start + (every or depth), depth)
        held_MN = torch.zeros_like(total_MN)
        for first in range(start, stop, AT_ONCE):
            last = min(first + AT_ONCE, stop)
            products_MNK = a_MK.grid[:, None, first:last] * b_NK.grid[None, :, first:last]
            held_MN = _aligned_sum(torch.cat([products_MNK, held_MN[..., None]], dim=2), bits)
        total_MN += held_MN * a_MK.scales[:, start, None] * b_NK.scales[None, :, start]
    return total_MN


def _aligned_sum(terms: Tensor, bits: int) -> Tensor:
    """The sum over the last axis of terms shifted to the largest exponent, cut to `bits` bits, and cut again."""
    spacing = _spacing(terms.abs().amax(dim=-1), bits)
    whole_numbers = terms.div_(spacing[..., None]).trunc_()
    total = whole_numbers.sum(dim=-1).mul_(spacing)  # sums below 2^24 are exact
    spacing = _spacing(total.abs(), bits)
    return total.div_(spacing).trunc_().mul_(spacing)


def _spacing(largest: Tensor, bits: int) -> Tensor:
    """The spacing of `bits`-bit numbers as large as `largest`, constant below every product of two codes."""
    exponent_bits = largest.clamp(min=2.0**-40).view(torch.int32).bitwise_and_(0x7F800000)
    binade = exponent_bits.view(torch.float32)
    return binade.mul_(2.0 ** (1 - bits))
