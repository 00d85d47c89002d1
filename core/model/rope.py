"""Rotary positions in the interleaved layout of the released model, with YaRN for long contexts.

A rotated vector holds pairs (x0, x1), (x2, x3), ...; pair j at position p turns by p * frequency[j]. The
tables are made from the positions of each call, so there is no buffer to cast, move or forget.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.contracts.build import Rope
from core.contracts.context import SequenceContext
from core.numerics import compiling
from core.numerics.compiling import assume_constant_result
from core.numerics.promotion import at_least_fp32


def correction_range(dim: int, theta: float, yarn: Any) -> tuple[int, int]:
    """The pairs between which YaRN moves from keeping a frequency to dividing it (10 and 23 for DeepSeek-V3)."""

    def pair(rotations: float) -> float:
        """The pair, a real number, that makes this many rotations over the original length."""
        positions_per_radian = yarn.original_length / (rotations * 2 * math.pi)
        return dim * math.log(positions_per_radian) / (2 * math.log(theta))

    low = math.floor(pair(yarn.beta_fast))
    high = math.ceil(pair(yarn.beta_slow))
    return max(low, 0), min(high, dim - 1)


@assume_constant_result
def _frequencies(dim: int, theta: float, yarn: tuple[float, ...] | None) -> tuple[float, ...]:
    """The frequencies as a constant for the compiler, which would otherwise trace into the cache and warn."""
    return _cached_frequencies(dim, theta, yarn)


@lru_cache(maxsize=64)
def _cached_frequencies(
    dim: int, theta: float, yarn: tuple[float, ...] | None
) -> tuple[float, ...]:
    """theta^(-2 j / dim) for each pair j; with YaRN (factor, low, high) those above the range are divided."""
    plain = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    if yarn is None:
        return tuple(plain)
    factor, low, high = yarn
    width = max(high - low, 0.001)
    keep = [1 - min(max((j - low) / width, 0.0), 1.0) for j in range(dim // 2)]
    return tuple(f / factor * (1 - k) + f * k for f, k in zip(plain, keep, strict=True))


def temperature(factor: float, mscale: float | None) -> float:
    """YaRN's temperature 0.1 m ln(s) + 1 for a factor s; 1 without a coefficient m."""
    if mscale and factor > 1:
        return 0.1 * mscale * math.log(factor) + 1.0
    return 1.0


def softmax_scale(head_dim: int, rope: Rope) -> float:
    """1/sqrt(head_dim), times YaRN's temperature of all dimensions squared (0.135234 for DeepSeek-V3)."""
    scale: float = head_dim**-0.5
    if rope.yarn is not None:
        scale *= temperature(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    return scale


def rope_table(
    rope: Rope, dim: int, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each of the positions' shape x dim/2, in `dtype` (fp32 or wider); angles are computed in fp64.

    With YaRN both carry the ratio of the two temperatures, which is 1 where their coefficients are equal.
    """
    arguments, ratio = _arguments(rope, dim)
    frequencies = _frequencies(*arguments)
    frequencies_R = torch.tensor(frequencies, dtype=torch.float64, device=positions.device)
    return _tables(positions, frequencies_R, ratio, dtype)


def _arguments(rope: Rope, dim: int) -> tuple[tuple[int, float, tuple[float, ...] | None], float]:
    """The arguments of `_frequencies`, and the ratio of the two temperatures."""
    if rope.yarn is None:
        return (dim, rope.theta, None), 1.0
    low, high = correction_range(dim, rope.theta, rope.yarn)
    factor = rope.yarn.factor
    rotated_temperature = temperature(factor, rope.yarn.mscale)
    ratio = rotated_temperature / temperature(factor, rope.yarn.mscale_all_dim)
    return (dim, rope.theta, (factor, low, high)), ratio


def _tables(
    positions: Tensor, frequencies_R: Tensor, ratio: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions times frequencies, times a ratio."""
    angles = positions.to(torch.float64)[..., None] * frequencies_R
    return (angles.cos() * ratio).to(dtype), (angles.sin() * ratio).to(dtype)


@lru_cache(maxsize=64)
def _kept_frequencies(
    dim: int, theta: float, yarn: tuple[float, ...] | None, device: torch.device
) -> Tensor:
    """The frequencies in fp64 on a device, kept because decoding must not copy from the host at every token."""
    with torch.inference_mode(False):
        frequencies = _cached_frequencies(dim, theta, yarn)
        return torch.tensor(frequencies, dtype=torch.float64, device=device)


def rotate(x_BLHR: Tensor, rope: Rope, positions_BL: Tensor) -> Tensor:
    """Rotates the pairs of the last axis by their positions, B x L or 1 x L; same shape and format as `x_BLHR`."""
    wide = at_least_fp32(x_BLHR)
    cos_BLR, sin_BLR = rope_table(rope, x_BLHR.shape[-1], positions_BL, wide.dtype)
    cos = cos_BLR[:, :, None, :]
    sin = sin_BLR[:, :, None, :]
    if compiling.is_eager_on_cpu(wide):
        turned: Tensor = _Rotate.apply(wide, torch.complex(cos, sin))  # type: ignore[no-untyped-call]
        return turned.to(x_BLHR.dtype)
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    rotated_even = even * cos - odd * sin
    rotated_odd = even * sin + odd * cos
    rotated = torch.stack((rotated_even, rotated_odd), dim=-1)
    return rotated.flatten(-2).to(x_BLHR.dtype)


def pairs_of_halves(x: Tensor) -> Tensor:
    """Reorders the last axis from [first of each pair | second of each pair] to pairs side by side.

    Models whose rotary positions are not interleaved pair element j with element j + half. Scores do not depend on the
    order of a key's elements, so queries and keys that were reordered alike are rotated as all others here.
    """
    pairs: Tensor = x.unflatten(-1, (2, -1)).transpose(-1, -2)
    return pairs.flatten(-2)


class _Rotate(torch.autograd.Function):
    """Each pair times cos + i sin, as one product of complex numbers; compilers and GPUs do without those."""

    @staticmethod
    def forward(ctx: Any, x_BLHR: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _times(x_BLHR, turn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHR: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _times(dy_BLHR, turn.conj()), None


def _times(x_BLHR: Tensor, turn: Tensor) -> Tensor:
    """The pairs of the last axis, as complex numbers, times others."""
    pairs = x_BLHR.unflatten(-1, (-1, 2))
    dense = pairs.stride(-1) == 1 and not pairs.storage_offset() % 2
    if not dense or any(stride % 2 for stride in pairs.stride()[:-1]):
        # Not `contiguous`: it returns an axis of length 1 as it is, with its odd stride, and the offset with it.
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)


def turns_of(context: SequenceContext, rope: Rope, dim: int, dtype: torch.dtype) -> Tensor:
    """The rotations of a decoding step as complex numbers, B x L x 1 x dim/2, computed once for all layers.

    Args:
        context: the new tokens.
        rope: the frequencies.
        dim: width of the rotated vectors.
        dtype: format of real and imaginary parts, fp32 or wider.
    """

    def compute() -> Tensor:
        positions_BL = context.positions_BL
        arguments, ratio = _arguments(rope, dim)
        frequencies_R = _kept_frequencies(*arguments, positions_BL.device)
        cos_BLR, sin_BLR = _tables(positions_BL, frequencies_R, ratio, dtype)
        return torch.complex(cos_BLR, sin_BLR)[:, :, None]

    return context.once(("turns", id(rope), dim, dtype), compute)


def turn(x_BLHR: Tensor, context: SequenceContext, rope: Rope) -> Tensor:
    """`rotate` in few operations, for decoding: a pair (x0, x1) is x0 + i x1, and turning is one complex product."""
    wide = at_least_fp32(x_BLHR)
    return _times(wide, turns_of(context, rope, wide.shape[-1], wide.dtype)).to(x_BLHR.dtype)
