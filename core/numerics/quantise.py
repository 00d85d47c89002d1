"""Rounding to small floating formats with a scale for each tile: the arithmetic under every FP8 precision.

A tile's scale is its largest magnitude over the format's largest value (report, section 3.3.2: online, no history), so
x = code * scale with codes that use the whole range. Tiles restart at the edge of a matrix and, where rows belong to
groups, at each group's first row; ragged edges are smaller tiles.

Three rules hold for every tile. A tile with anything non-finite becomes NaN as a whole: the cast to FP8 would saturate,
and hide it. Codes are clamped before they are cast. A scale is at least the smallest normal fp32 number, which zero
tiles need and no tile with an element above 6e-36 meets: a larger floor would crush small gradients.

Shapes: M rows, N columns, [..., M, N] for weights of several experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Format:
    """A small floating format.

    Args:
        name: as settings and tables write it.
        mantissa: stored bits of the significand.
        exponent: of the smallest normal number; below it spacing is constant.
        largest: magnitude.
        dtype: torch's name for its codes; None where torch has none.
    """

    name: str
    mantissa: int
    exponent: int
    largest: float
    dtype: torch.dtype | None


E4M3 = Format("e4m3", 3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 2, -14, 57344.0, torch.float8_e5m2)
E5M6 = Format("e5m6", 6, -14, 65024.0, None)
"""For the activation that attention's backward needs too (report, section 3.3.3); exponents as in E5M2 and fp16."""
FORMATS = {form.name: form for form in (E4M3, E5M2, E5M6)}


@dataclass(frozen=True)
class Tile:
    """Rows and columns that share a scale; 0 means all of them."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return "tensor" if self == WHOLE else f"{self.rows}x{self.columns}"


ROW, BLOCK, COLUMN = Tile(1, 128), Tile(128, 128), Tile(128, 1)
WHOLE = Tile(0, 0)


@dataclass(frozen=True)
class Quantised:
    """Codes and scales of a matrix.

    Args:
        codes: [..., M, N], in the format's dtype; E5M6 as `pack12` leaves it.
        scales: fp32 [..., tiles down, tiles across]; of grouped rows one row of scales for each tile of each group.
        tile: which elements share one.
        form: of the codes.
        columns: N; packed codes are padded to an even number.
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
    """code * scale in fp32."""
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
        amax: largest magnitudes to take the scales from instead of the tiles' own; 0 where none is known.
    """
    result: Tensor = _rounded(x, tile.rows, tile.columns, form.name, power_of_two, ends_E, amax)
    return result


def rounded_and_kept(
    x: Tensor, tile: Tile, form: Format, *, power_of_two: bool = False, amax: Tensor | None = None
) -> tuple[Tensor, Quantised]:
    """`rounded(x)` and the codes and scales that it comes from, to be saved for the backward pass."""
    values, codes, scales = _rounded_and_kept(x, tile.rows, tile.columns, form.name, power_of_two, amax)
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
    """As `rounded`, but the numbers on the format's grid, and every element's scale beside it: for references."""
    if ends_E is None or tile.rows == 1:
        on_grid, scales = _scaled(x, tile, form, power_of_two, amax)
        return on_grid, spread(scales, on_grid, tile)
    return _scaled_columns(x, tile, form, power_of_two, ends_E)


def spread(scales: Tensor, like: Tensor, tile: Tile) -> Tensor:
    """Every element's scale, in the shape of `like`, fp32."""
    ones = torch.ones_like(like)
    return _apply(torch.mul, ones, scales, tile, out=ones)


# ---- scales


def scales_of(amax: Tensor, form: Format, *, power_of_two: bool) -> Tensor:
    """The scale of each largest magnitude; NaN where that is not finite."""
    largest = amax.new_full((), form.largest)  # by a Python number CUDA multiplies by a rounded reciprocal
    scales = (amax / largest).clamp(min=SMALLEST)
    if power_of_two:  # add what carries into the exponent unless the mantissa is 0, then cut the mantissa off
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax.isfinite(), scales, torch.nan)


def tile_amax(x: Tensor, tile: Tile) -> Tensor:
    """The largest magnitude of every tile of [..., M, N]: [..., tiles down, tiles across]; 0 of an empty matrix."""
    size = x.abs()
    down, across = _pieces(x.shape[-2], tile.rows), _pieces(x.shape[-1], tile.columns)
    if not (down and across):
        return size.new_zeros(*x.shape[:-2], tiles(x.shape[-2], tile.rows), tiles(x.shape[-1], tile.columns))
    strips = []
    for rows in down:
        parts = [_fold(size, rows, columns).amax(dim=(-3, -1)) for columns in across]
        strips.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=-2)


def tiles(size: int, tile: int) -> int:
    """Tiles along an axis; one where the tile is the whole axis."""
    return -(-size // tile) if tile else 1


@dataclass(frozen=True)
class _Piece:
    """A stretch of an axis that whole tiles, or one smaller tile at the edge, make up."""

    start: int
    stop: int
    tile: int
    first: int

    @property
    def tiles(self) -> slice:
        return slice(self.first, self.first + (self.stop - self.start) // self.tile)


def _pieces(size: int, tile: int) -> list[_Piece]:
    tile = tile or max(size, 1)
    whole = size // tile * tile
    main = [_Piece(0, whole, tile, 0)] if whole else []
    edge = [_Piece(whole, size, size - whole, whole // tile)] if size > whole else []
    return main + edge


def _fold(x: Tensor, rows: _Piece, columns: _Piece) -> Tensor:
    """A view [..., tiles down, rows, tiles across, columns] of a part of x."""
    part = x[..., rows.start : rows.stop, columns.start : columns.stop]
    folded: Tensor = part.unflatten(-2, (-1, rows.tile)).unflatten(-1, (-1, columns.tile))
    return folded


def _apply(operation: Callable[..., Tensor], x: Tensor, scales: Tensor, tile: Tile, *, out: Tensor) -> Tensor:
    """`operation(x, scale of its tile)` for every element, written into `out`, which may be x."""
    for rows in _pieces(x.shape[-2], tile.rows):
        for columns in _pieces(x.shape[-1], tile.columns):
            per_tile = scales[..., rows.tiles, columns.tiles][..., :, None, :, None]
            operation(_fold(x, rows, columns), per_tile, out=_fold(out, rows, columns))
    return out


def _scaled(
    x: Tensor, tile: Tile, form: Format, power_of_two: bool, amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x / scale on the format's grid, and the scales."""
    x = x.to(torch.float32)
    own = tile_amax(x, tile)
    largest = own if amax is None else torch.where(own.isfinite() & (amax > 0), amax, own)
    scales = scales_of(largest, form, power_of_two=power_of_two)
    on_grid = _apply(torch.div, x, scales, tile, out=torch.empty_like(x, memory_format=torch.contiguous_format))
    return onto_grid_(on_grid, form), scales


def _scaled_columns(x: Tensor, tile: Tile, form: Format, power_of_two: bool, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """The same for tiles of one column that restart with every group; the scales of each row; only rows of a group."""
    assert tile.columns == 1 and tile.rows, "tiles of grouped rows are of one row or of one column"  # noqa: PT018
    x = x.to(torch.float32)
    ends = ends_E.tolist()
    size, parts, sizes = x[: ends[-1]].abs(), [], []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        for start in range(begin, end, tile.rows):
            stop = min(start + tile.rows, end)
            parts.append(size[start:stop].amax(dim=0))
            sizes.append(stop - start)
    if not parts:
        return x[:0], x[:0]
    scales = scales_of(torch.stack(parts), form, power_of_two=power_of_two)
    per_row = scales.repeat_interleave(torch.tensor(sizes, device=x.device), dim=0, output_size=len(size))
    return onto_grid_(x[: len(size)] / per_row, form), per_row


# ---- the grid of a format


def onto_grid_(x: Tensor, form: Format) -> Tensor:
    """Clamp to the format's range and round to its nearest number, ties to even, in place; fp32, NaN stays.

    1.5 * 2^k, with k so that fp32 numbers of its size are as far apart as the format's are near x, pushes all
    other bits out when it is added and taken away. Subnormals have the spacing of the smallest normal number.
    """
    x.clamp_(-form.largest, form.largest)
    binade = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=(127 + form.exponent) << 23).view(torch.float32)
    magic = binade.mul_(1.5 * 2.0 ** (23 - form.mantissa))
    return x.add_(magic).sub_(magic)


def encode(on_grid: Tensor, form: Format) -> Tensor:
    """The codes of fp32 numbers that lie on the format's grid."""
    return pack12(on_grid) if form.dtype is None else on_grid.to(form.dtype)


def decode(codes: Tensor, form: Format) -> Tensor:
    """fp32 numbers of codes.

    E4M3 on CPUs goes by way of fp16, which has one exponent bit more in the same place: torch's own cast takes eight
    times as long there. The two codes for NaN are never written: a tile that is no number has a scale that is none.
    """
    if form.dtype is None:
        return unpack12(codes)
    if form is not E4M3 or codes.device.type != "cpu":
        return codes.to(torch.float32)
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x8000 | 0x3FFF)
    return bits.view(torch.float16).to(torch.float32).mul_(2.0**8)


def pack12(on_grid: Tensor) -> Tensor:
    """E5M6 numbers as the upper 12 bits of fp16, two in three bytes: uint8 [..., 3 ceil(N/2)]."""
    if on_grid.shape[-1] % 2:
        on_grid = torch.nn.functional.pad(on_grid, (0, 1))
    high = on_grid.to(torch.float16).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).bitwise_right_shift_(4)
    even, odd = high[..., 0::2], high[..., 1::2]
    return torch.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], dim=-1).to(torch.uint8).flatten(-2)


def unpack12(codes: Tensor) -> Tensor:
    """What `pack12` packed, one column of zeros more where it was odd."""
    first, middle, last = codes.unflatten(-1, (-1, 3)).to(torch.int32).unbind(-1)
    high = torch.stack([first << 4 | middle >> 4, (middle & 15) << 8 | last], dim=-1).flatten(-2)
    signed = (high << 4).bitwise_and_(0xFFFF).to(torch.int16)
    return signed.view(torch.float16).to(torch.float32)


# ---- operators of our own, so that a graph holds them whole


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
    tile, grid = Tile(rows, columns), FORMATS[form]
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
    tile, grid = Tile(rows, columns), FORMATS[form]
    on_grid, scales = _scaled(x, tile, grid, power_of_two, amax)
    codes = encode(on_grid, grid)
    return _apply(torch.mul, on_grid, scales, tile, out=on_grid), codes, scales


def _shape_of_scales(x: Tensor, rows: int, columns: int) -> Iterator[int]:
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
    width = x.shape[-1] if dtype is not None else 3 * -(-x.shape[-1] // 2)
    codes = x.new_empty(*x.shape[:-1], width, dtype=torch.uint8 if dtype is None else dtype)
    values = x.new_empty(x.shape, dtype=torch.float32)
    return values, codes, x.new_empty(tuple(_shape_of_scales(x, rows, columns)), dtype=torch.float32)
