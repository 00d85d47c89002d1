"""`scaled_mm` as CUDA has it on Hopper: what it checks of shapes and layouts, and a product in fp64."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

TILES, BLOCKS = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128


def dense_scales(scales: Tensor, kind: Any, rows: int, width: int) -> Tensor:
    """Every element's scale, [rows, width], after the checks of shape, format and strides."""
    across = math.ceil(width / 128)
    assert scales.dtype == torch.float32
    assert scales.data_ptr() % 16 == 0
    if kind == TILES:
        assert tuple(scales.shape) == (rows, across)
        assert scales.stride() == (1, rows)
        return scales.repeat_interleave(128, 1)[:, :width]
    assert kind == BLOCKS
    length = 4 * math.ceil(across / 4)
    assert tuple(scales.shape) == (length, math.ceil(rows / 128))
    assert scales.stride() == (1, length)
    return (
        scales.t()[:, :across].repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :width]
    )


def hopper_scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: Any,
    scale_b: Tensor,
    scale_recipe_b: Any,
    *,
    output_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """a b for row-major a and column-major b."""
    (m, k), n = mat_a.shape, mat_b.shape[1]
    assert not use_fast_accum
    assert mat_a.dtype == mat_b.dtype == torch.float8_e4m3fn
    assert 0 not in (m, n, k)
    assert k % 16 == n % 16 == 0
    assert m % 16 == k % 128 == 0, (
        "cuBLAS takes fewer, but these are the sizes that its documentation promises"
    )
    assert mat_a.stride() == (k, 1)
    assert mat_b.stride() == (1, k)
    assert mat_a.data_ptr() % 16 == mat_b.data_ptr() % 16 == 0
    assert (scale_recipe_a, scale_recipe_b) != (BLOCKS, BLOCKS)
    a = mat_a.double() * dense_scales(scale_a, scale_recipe_a, m, k)
    b = mat_b.t().double() * dense_scales(scale_b, scale_recipe_b, n, k)
    return (a @ b.t()).to(output_dtype)
