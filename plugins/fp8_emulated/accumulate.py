"""Tensor cores that keep few bits of a sum, as a slow reference (report, section 3.3.2, figure 7b).

The model: codes are multiplied exactly. Every 32 products are added to an accumulator at once; all of them, the
accumulator too, are first shifted to the largest exponent among them, and what lies below `bits` significant bits is
cut off. Every `every` elements the accumulator is multiplied by the scales, added to an fp32 sum, and emptied: the
promotion to CUDA cores. Without promotion there is one accumulator for the whole sum, which allows one scale only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.numerics.quantise import E4M3, Format, Quantised, Tile, decode, scaled, spread
from core.numerics.quantised_product import Kept
from plugins.fp8_emulated.rounding import EmulatedRounding

AT_ONCE = 32
"""Products that one instruction adds: the depth of Hopper's FP8 matrix instruction."""
ROOM = 1 << 22
"""Products that are held at a time."""


@dataclass(frozen=True)
class Scaled:
    """An operand as hardware gets it: numbers of the grid, and the scale of each, both [..., R, C]."""

    grid: Tensor
    scales: Tensor

    def t(self) -> "Scaled":
        """Rows and columns exchanged."""
        return Scaled(self.grid.transpose(-2, -1), self.scales.transpose(-2, -1))

    def __getitem__(self, index: Any) -> "Scaled":
        return Scaled(self.grid[index], self.scales[index])


@dataclass(frozen=True, kw_only=True)
class NarrowRounding(EmulatedRounding):
    """The same operands, multiplied with an accumulator of few bits.

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
        """Numbers of the grid and their scales."""
        power_of_two, known = power_of_two or self.power_of_two, self._known(which)
        return Scaled(*scaled(x, tile, form, power_of_two=power_of_two, ends_E=ends_E, amax=known))

    def operand_of(self, stored: Quantised) -> Scaled:
        """From codes."""
        grid = decode(stored.codes, stored.form)
        return Scaled(grid, spread(stored.scales, grid, stored.tile))

    def operand_and_codes(self, x: Tensor, tile: Tile, which: str) -> tuple[Scaled, Kept]:
        """Both at once."""
        _, kept = super().operand_and_codes(x, tile, which)
        codes, scales = kept
        return self.operand_of(Quantised(codes, scales, tile, E4M3, x.shape[-1])), kept

    def product(self, rows: Scaled, weight: Scaled, ends_E: Tensor | None) -> Tensor:
        """rows @ weight^T."""
        if ends_E is None:
            return accumulated(rows, weight, bits=self.bits, every=self.every)
        y_AO = rows.grid.new_zeros(len(rows.grid), weight.grid.shape[1])
        for expert, part in _spans(ends_E):
            y_AO[part] = accumulated(rows[part], weight[expert], bits=self.bits, every=self.every)
        return y_AO

    def product_back(self, rows: Scaled, weight: Scaled, ends_E: Tensor | None) -> Tensor:
        """rows @ weight."""
        return self.product(rows, weight.t(), ends_E)

    def outer(self, dy: Scaled, x: Scaled, ends_E: Tensor | None) -> Tensor:
        """dy^T x, for each expert."""
        if ends_E is None:
            return accumulated(dy.t(), x.t(), bits=self.bits, every=self.every)
        dw_EOI = dy.grid.new_zeros(len(ends_E), dy.grid.shape[1], x.grid.shape[1])
        for expert, part in _spans(ends_E):
            dw_EOI[expert] = accumulated(dy[part].t(), x[part].t(), bits=self.bits, every=self.every)
        return dw_EOI


def _spans(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    ends = ends_E.tolist()
    yield from enumerate(slice(*span) for span in zip([0, *ends[:-1]], ends, strict=True))


def accumulated(a_MK: Scaled, b_NK: Scaled, *, bits: int, every: int | None) -> Tensor:
    """a b^T, [M, N] in fp32, through an accumulator that keeps `bits` bits and is promoted after `every` elements.

    Within `every` elements, all of K if None, a row's scale must not change.
    """
    rows = max(1, ROOM // (AT_ONCE * max(1, len(b_NK.grid))))
    parts = [_rows(a_MK[start : start + rows], b_NK, bits, every) for start in range(0, len(a_MK.grid), rows)]
    return torch.cat(parts) if parts else a_MK.grid.new_zeros(0, len(b_NK.grid))


def _rows(a_MK: Scaled, b_NK: Scaled, bits: int, every: int | None) -> Tensor:
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
    total = terms.div_(spacing[..., None]).trunc_().sum(dim=-1).mul_(spacing)  # whole numbers below 2^24: exact
    spacing = _spacing(total.abs(), bits)
    return total.div_(spacing).trunc_().mul_(spacing)


def _spacing(largest: Tensor, bits: int) -> Tensor:
    """Of `bits`-bit numbers as large as `largest`; below every product of two codes it stays where it is."""
    binade = largest.clamp(min=2.0**-40).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    return binade.mul_(2.0 ** (1 - bits))
