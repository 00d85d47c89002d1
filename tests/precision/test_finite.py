"""Numbers that are not finite are found in every format, at every place, and finite ones never are."""

import math

import pytest
import torch

from core.numerics.finite import first_not_finite, holds_nan, is_finite, not_finite_in

FORMATS = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_one_number_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for value in (math.nan, math.inf, -math.inf):
        if dtype == torch.float8_e4m3fn and math.isinf(value):
            continue  # this format has no infinity: its cast saturates
        for length in (1, 7, 33, 1000):
            for place in {0, length // 2, length - 1}:
                numbers = torch.randn(length, generator=draw).to(dtype)
                numbers[place] = value
                assert first_not_finite(numbers) == (place,)
                assert holds_nan(numbers) == math.isnan(value)
                if dtype.itemsize == 1:
                    numbers.view(torch.uint8)[place] |= 0x80
                    assert first_not_finite(numbers) == (place,)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_largest_numbers_zeros_and_nothing_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    numbers = torch.tensor([limits.max, limits.min, 0.0, -0.0, limits.tiny], dtype=torch.float64)
    assert is_finite(numbers.to(dtype))
    assert is_finite(numbers[:0].to(dtype))
    assert not holds_nan(numbers.to(dtype))


def test_the_first_tensor_is_named_with_its_place() -> None:
    second = torch.zeros(2, 3)
    second[1, 2] = math.inf
    tensors = {
        "count": torch.ones(2, dtype=torch.int64),
        "a": torch.ones(4),
        "state": None,
        "b": second,
        "c": torch.tensor(math.nan),
    }
    assert not_finite_in(tensors) == "tensor b holds a number that is not finite (inf at [1, 2])"
    del tensors["b"]
    assert not_finite_in(tensors) == "tensor c holds a number that is not finite (nan at [])"
