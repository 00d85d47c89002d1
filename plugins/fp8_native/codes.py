"""The arithmetic of the Triton kernels: scales of tiles, E4M3 codes of numbers, numbers of codes, codes in words.

Scales are those of `core.numerics.quantise` and codes those of `core.numerics.number_formats`, bit for bit. The largest
magnitude of a tile is found among bit patterns, which for finite numbers, infinities and NaN are in that order;
divisions are IEEE's; what rounds to zero becomes +0, as it does there.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter casts neither ties nor NaN to E4M3 as GPUs do."""
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def fp32_of(x):
    """x in fp32; bf16 is widened by its bits, because the interpreter's cast loses subnormal numbers."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def magnitude(x):
    """The bits of |x|, which are in the order of the numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax_bits, POWER_OF_TWO: tl.constexpr):
    """The scales of tiles with these largest magnitudes; see `core.numerics.quantise.scales_of`."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    bits = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32)).to(tl.int32, bitcast=True)
    bits = tl.maximum(bits, 0x00800000)
    if POWER_OF_TWO:
        bits = (bits + 0x7FFFFF) & INFINITE
    return tl.where(amax_bits < INFINITE, bits, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def _divide(x, scale):
    """x / scale as IEEE rounds it, by one reciprocal for a tile instead of a division for an element.

    From y, the reciprocal rounded to nearest, q = x y is improved by its remainder twice. The first leaves q within one
    unit of its last place, and then the second rounds as a division does (Markstein, IBM J. Res. Dev. 34(1), 1990) as
    long as remainders are exact: tiny tiles are lifted by a power of two, and where quotients are tiny codes are 0.
    """
    if INTERPRETED:  # without fused multiply-add
        q = tl.div_rn(x, scale)
    else:
        lift = tl.where(scale < 8.673617379884035e-19, 1.2089258196146292e24, 1.0)  # 2^-60, 2^80
        x, scale = x * lift, scale * lift
        y = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        less, y = tl.broadcast_to(-scale, x.shape), tl.broadcast_to(y, x.shape)
        q = x * y
        q = tl.fma(tl.fma(q, less, x), y, q)
        q = tl.fma(tl.fma(q, less, x), y, q)
    return q


@triton.jit
def encode(x, scale):
    """E4M3 codes of x / scale as bytes: nearest, ties to even, no negative zero."""
    q = _divide(x, scale)
    if INTERPRETED:
        bits = q.to(tl.int32, bitcast=True)
        binade = tl.maximum(bits & INFINITE, 121 << 23)
        magic = binade.to(tl.float32, bitcast=True) * 1572864.0  # 1.5 * 2^20; see `onto_grid_`
        units = (q + magic).to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
        code = (((binade >> 23) - 121) << 3) + tl.abs(units) + tl.where(units < 0, 0x80, 0)
        code = tl.where(q == q, code, 0x7F).to(tl.uint8)
    else:
        q = tl.where(tl.abs(q) <= 0.0009765625, 0.0, q)  # 2^-10: half of the smallest code
        code = q.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return code


@triton.jit
def decode(codes):
    """The fp32 numbers of codes, as in `core.numerics.number_formats.decode`."""
    if INTERPRETED:
        # The mask clears the upper bit of fp16's exponent.
        bits = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return values


@triton.jit
def pack_words(a, b, c, d):
    """Four codes packed into a word, the first in its lowest byte."""
    a, b, c, d = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), d.to(tl.int32)
    if INTERPRETED:
        word = a | (b << 8) | (c << 16) | (d << 24)
    else:  # assembly, because the compiler rewrites the shifts as a packing of bytes
        word = tl.inline_asm_elementwise(
            "{ .reg .b32 l, h; prmt.b32 l, $1, $2, 0x0040; prmt.b32 h, $3, $4, 0x0040; prmt.b32 $0, l, h, 0x5410; }",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return word


@triton.jit
def largest(a, b, c, d):
    """The largest magnitudes of four tiles, element by element."""
    return tl.maximum(
        tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d))
    )
