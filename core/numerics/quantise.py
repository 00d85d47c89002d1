"""Rounding to small floating formats with a scale for each tile: the arithmetic under every FP8 precision.

A tile's scale is its largest magnitude over the format's largest value (report, section 3.3.2: online, no history), so
x = code * scale with codes that use the whole range. Tiles restart at the edge of a matrix and, where rows belong to
groups, at each group's first row; ragged edges are smaller tiles.

Three rules hold for every tile. A tile with anything non-finite becomes NaN as a whole: the cast to FP8 would saturate
and hide it. Codes are clamped before they are cast. A scale is at least the smallest normal fp32 number, which zero
tiles need and no tile with an element above 6e-36 reaches: a larger minimum would crush small gradients.

Shapes: M rows, N columns, [..., M, N] for weights of several experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.numerics.number_formats import FORMATS, Format, decode, encode, onto_grid_

SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Tile:
    """Rows and columns that share a scale; 0 means all of them."""

    rows: int
    columns: int

    def __str__(self) -> str:
        if self == WHOLE:
            return "tensor"
        return f"{self.rows}x{self.columns}"


ROW = Tile(1, 128)
BLOCK = Tile(128, 128)
COLUMN = Tile(128, 1)
WHOLE = Tile(0, 0)


@dataclass(frozen=True)
class Quantised:
    """Codes and scales of a matrix.

    Args:
        codes: [..., M, N], in the format's dtype; E5M6 as `pack12` leaves it.
        scales: fp32 [..., tiles down, tiles across]; of grouped rows one row of scales for each tile of each group.
        tile: the elements that share a scale.
        form: format of the codes.
        columns: N; packed codes are padded to an even number of columns.
    """

    codes: Tensor
    scales: Tensor
    tile: Tile
    form: Format
    columns: int


def quantise(x: Tensor, tile: Tile, form: Format, *, power_of_two: bool = False) -> Quantised:
    """Codes and scales of [..., M, N]; x is read as fp32.

    Args:
        power_of_two: round scales up to powers of two (UE8M0), which makes requantising from tile to tile exact.
    """
    on_grid, scales = _scaled(x, tile, form, power_of_two)
    return Quantised(encode(on_grid, form), scales, tile, form, x.shape[-1])


def dequantise(quantised: Quantised) -> Tensor:
    """The numbers code * scale in fp32."""
    values = decode(quantised.codes, quantised.form)[..., : quantised.columns]
    return _apply(torch.mul, values, quantised.scales, quantised.tile, out=values)


def rounded(
    x: Tensor,
    tile: Tile,
    form: Format,
    *,
    power_of_two: bool = False,
    ends_E: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    """`dequantise(quantise(x))` in fp32, without codes in between.

    Args:
        ends_E: where the rows of each group end, for tiles that must not cross groups; rows past the last are 0.
        amax: largest magnitudes from which scales are made instead of the tiles' own; 0 where none is known.
    """
    result: Tensor = _rounded(x, tile.rows, tile.columns, form.name, power_of_two, ends_E, amax)
    return result


def rounded_and_kept(
    x: Tensor, tile: Tile, form: Format, *, power_of_two: bool = False, amax: Tensor | None = None
) -> tuple[Tensor, Quantised]:
    """`rounded(x)` and the codes and scales that it comes from, to be saved for the backward pass."""
    values, codes, scales = _rounded_and_kept(
        x, tile.rows, tile.columns, form.name, power_of_two, amax
    )
    return values, Quantised(codes, scales, tile, form, x.shape[-1])


def scaled(
    x: Tensor,
    tile: Tile,
    form: Format,
    *,
    power_of_two: bool = False,
    ends_E: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The numbers of `rounded` on the format's grid and every element's scale, kept apart: for references."""
    if ends_E is None or tile.rows == 1:
        on_grid, scales = _scaled(x, tile, form, power_of_two, amax)
        return on_grid, spread(scales, on_grid, tile)
    return _scaled_columns(x, tile, form, power_of_two, ends_E)


def spread(scales: Tensor, like: Tensor, tile: Tile) -> Tensor:
    """The scale of every element, in the shape of `like`, fp32."""
    ones = torch.ones_like(like)
    return _apply(torch.mul, ones, scales, tile, out=ones)


# ---- scales


def scales_of(amax: Tensor, form: Format, *, power_of_two: bool) -> Tensor:
    """The scale of each largest magnitude; NaN where that is not finite."""
    # A tensor, because CUDA would multiply by the rounded reciprocal of a Python number.
    largest = amax.new_full((), form.largest)
    scales = (amax / largest).clamp(min=SMALLEST)
    if power_of_two:
        # Adding 0x7FFFFF carries into the exponent unless the mantissa is 0; then the mantissa is cut off.
        bits = (scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000
        scales = bits.view(torch.float32)
    return torch.where(amax.isfinite(), scales, torch.nan)


def tile_amax(x: Tensor, tile: Tile) -> Tensor:
    """The largest magnitude of every tile of [..., M, N]: [..., tiles down, tiles across]; 0 of an empty matrix."""
    size = x.abs()
    down = _stretches(x.shape[-2], tile.rows)
    across = _stretches(x.shape[-1], tile.columns)
    if not (down and across):
        return size.new_zeros(tuple(_shape_of_scales(x, tile.rows, tile.columns)))
    strips = []
    for rows in down:
        parts = [_fold(size, rows, columns).amax(dim=(-3, -1)) for columns in across]
        strip = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        strips.append(strip)
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=-2)


def tiles(size: int, tile: int) -> int:
    """The number of tiles along an axis; one where the tile is the whole axis."""
    return -(-size // tile) if tile else 1


@dataclass(frozen=True)
class _Stretch:
    """A part of an axis that is made of whole tiles, or of one smaller tile at the edge.

    Args:
        start, stop: elements.
        tile: elements of a tile.
        first: number of its first tile.
    """

    start: int
    stop: int
    tile: int
    first: int

    @property
    def tiles(self) -> slice:
        """The numbers of its tiles."""
        return slice(self.first, self.first + (self.stop - self.start) // self.tile)


def _stretches(size: int, tile: int) -> list[_Stretch]:
    """The whole tiles of an axis, and the smaller tile at its edge, if there are any."""
    tile = tile or max(size, 1)
    whole = size // tile * tile
    found = []
    if whole:
        found.append(_Stretch(0, whole, tile, 0))
    if size > whole:
        found.append(_Stretch(whole, size, size - whole, whole // tile))
    return found


def _fold(x: Tensor, rows: _Stretch, columns: _Stretch) -> Tensor:
    """A view [..., tiles down, rows, tiles across, columns] of a part of x."""
    part = x[..., rows.start : rows.stop, columns.start : columns.stop]
    folded: Tensor = part.unflatten(-2, (-1, rows.tile)).unflatten(-1, (-1, columns.tile))
    return folded


def _apply(
    operation: Callable[..., Tensor], x: Tensor, scales: Tensor, tile: Tile, *, out: Tensor
) -> Tensor:
    """Writes `operation(x, scale of its tile)` for every element into `out`, which may be x, and returns it."""
    for rows in _stretches(x.shape[-2], tile.rows):
        for columns in _stretches(x.shape[-1], tile.columns):
            per_tile = scales[..., rows.tiles, columns.tiles][..., :, None, :, None]
            operation(_fold(x, rows, columns), per_tile, out=_fold(out, rows, columns))
    return out


def _scaled(
    x: Tensor, tile: Tile, form: Format, power_of_two: bool, amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x / scale on the format's grid, and the scales."""
    x = x.to(torch.float32)
    largest = tile_amax(x, tile)
    if amax is not None:
        largest = torch.where(largest.isfinite() & (amax > 0), amax, largest)
    scales = scales_of(largest, form, power_of_two=power_of_two)
    quotient = torch.empty_like(x, memory_format=torch.contiguous_format)
    _apply(torch.div, x, scales, tile, out=quotient)
    return onto_grid_(quotient, form), scales


def _scaled_columns(
    x: Tensor, tile: Tile, form: Format, power_of_two: bool, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """`_scaled` for tiles of one column that restart with every group: the numbers and each row's scales.

    Rows without a group are left out.
    """
    assert tile.columns == 1 and tile.rows, "tiles of grouped rows are of one row or of one column"  # noqa: PT018
    x = x.to(torch.float32)
    ends = ends_E.tolist()
    size = x[: ends[-1]].abs()
    parts = []
    sizes = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        for start in range(begin, end, tile.rows):
            stop = min(start + tile.rows, end)
            parts.append(size[start:stop].amax(dim=0))
            sizes.append(stop - start)
    if not parts:
        return x[:0], x[:0]
    scales = scales_of(torch.stack(parts), form, power_of_two=power_of_two)
    rows = torch.tensor(sizes, device=x.device)
    per_row = scales.repeat_interleave(rows, dim=0, output_size=len(size))
    return onto_grid_(x[: len(size)] / per_row, form), per_row


# ---- custom operators, each of which is one node of a traced graph


@torch.library.custom_op("moeloom::rounded", mutates_args=())
def _rounded(
    x: Tensor,
    rows: int,
    columns: int,
    form: str,
    power_of_two: bool,
    ends_E: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    tile = Tile(rows, columns)
    grid = FORMATS[form]
    if ends_E is None or tile.rows == 1:
        on_grid, scales = _scaled(x, tile, grid, power_of_two, amax)
        return _apply(torch.mul, on_grid, scales, tile, out=on_grid)
    on_grid, per_row = _scaled_columns(x, tile, grid, power_of_two, ends_E)
    result = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    torch.mul(on_grid, per_row, out=result[: len(on_grid)])
    return result


@torch.library.custom_op("moeloom::rounded_and_kept", mutates_args=())
def _rounded_and_kept(
    x: Tensor, rows: int, columns: int, form: str, power_of_two: bool, amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    tile = Tile(rows, columns)
    grid = FORMATS[form]
    on_grid, scales = _scaled(x, tile, grid, power_of_two, amax)
    codes = encode(on_grid, grid)
    return _apply(torch.mul, on_grid, scales, tile, out=on_grid), codes, scales


def _shape_of_scales(x: Tensor, rows: int, columns: int) -> Iterator[int]:
    """The shape [..., tiles down, tiles across] of the scales of x."""
    yield from x.shape[:-2]
    yield tiles(x.shape[-2], rows)
    yield tiles(x.shape[-1], columns)


@_rounded.register_fake
def _(
    x: Tensor,
    rows: int,
    columns: int,
    form: str,
    power_of_two: bool,
    ends_E: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@_rounded_and_kept.register_fake
def _(
    x: Tensor, rows: int, columns: int, form: str, power_of_two: bool, amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = FORMATS[form].dtype
    width = x.shape[-1]
    if dtype is None:  # `pack12`: two numbers in three bytes
        dtype = torch.uint8
        width = 3 * -(-width // 2)
    values = x.new_empty(x.shape, dtype=torch.float32)
    codes = x.new_empty(*x.shape[:-1], width, dtype=dtype)
    scales = x.new_empty(tuple(_shape_of_scales(x, rows, columns)), dtype=torch.float32)
    return values, codes, scales
