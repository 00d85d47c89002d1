"""Small floating formats: their grids of numbers, rounding to them, and the codes that store them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Format:
    """A floating format of few bits.

    Args:
        name: the name in settings and tables.
        mantissa: stored bits of the significand.
        exponent: exponent of the smallest normal number; below it the spacing is constant.
        largest: the largest magnitude.
        dtype: torch's format of its codes; None where torch has none.
    """

    name: str
    mantissa: int
    exponent: int
    largest: float
    dtype: torch.dtype | None


E4M3 = Format("e4m3", 3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 2, -14, 57344.0, torch.float8_e5m2)
E5M6 = Format("e5m6", 6, -14, 65024.0, None)
"""The format of the activation that attention's backward needs too (report, section 3.3.3); exponents as in fp16."""
FORMATS = {form.name: form for form in (E4M3, E5M2, E5M6)}


def onto_grid_(x: Tensor, form: Format) -> Tensor:
    """Clamps x to the format's range and rounds it to the nearest number, ties to even, in place; fp32, NaN stays.

    1.5 * 2^k, with k so that fp32 numbers of its size are as far apart as the format's are near x, pushes all
    other bits out when it is added and taken away. Subnormals have the spacing of the smallest normal number.
    """
    x.clamp_(-form.largest, form.largest)
    smallest_normal = (127 + form.exponent) << 23
    exponent_bits = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=smallest_normal)
    binade = exponent_bits.view(torch.float32)
    magic = binade.mul_(1.5 * 2.0 ** (23 - form.mantissa))
    return x.add_(magic).sub_(magic)


def encode(on_grid: Tensor, form: Format) -> Tensor:
    """The codes of fp32 numbers that lie on the format's grid."""
    if form.dtype is None:
        return pack12(on_grid)
    return on_grid.to(form.dtype)


def decode(codes: Tensor, form: Format) -> Tensor:
    """The fp32 numbers that codes represent.

    E4M3 on CPUs is read as fp16, which has one exponent bit more in the same place: torch's own cast takes eight times
    as long there. The two codes for NaN are never written: a tile with NaN has NaN as its scale.
    """
    if form.dtype is None:
        return unpack12(codes)
    if form is not E4M3 or codes.device.type != "cpu":
        return codes.to(torch.float32)
    shifted = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    bits = shifted.bitwise_and_(-0x8000 | 0x3FFF)
    return bits.view(torch.float16).to(torch.float32).mul_(2.0**8)


def pack12(on_grid: Tensor) -> Tensor:
    """E5M6 numbers as the upper 12 bits of fp16, two in three bytes: uint8 [..., 3 ceil(N/2)]."""
    if on_grid.shape[-1] % 2:
        on_grid = F.pad(on_grid, (0, 1))
    bits = on_grid.to(torch.float16).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    high = bits.bitwise_right_shift_(4)
    even = high[..., 0::2]
    odd = high[..., 1::2]
    three_bytes = torch.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], dim=-1)
    return three_bytes.to(torch.uint8).flatten(-2)


def unpack12(codes: Tensor) -> Tensor:
    """The fp32 numbers that `pack12` packed, with a column of zeros where their number was odd."""
    first, middle, last = codes.unflatten(-1, (-1, 3)).to(torch.int32).unbind(-1)
    high = torch.stack([first << 4 | middle >> 4, (middle & 15) << 8 | last], dim=-1).flatten(-2)
    signed = (high << 4).bitwise_and_(0xFFFF).to(torch.int16)
    return signed.view(torch.float16).to(torch.float32)
