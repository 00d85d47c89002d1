"""Rounding to small formats: the grid, tiles and scales, what is not finite, and codes packed and unpacked."""

import math
import random

import pytest
import torch
from torch import Tensor

from core.numerics import number_formats
from core.numerics import quantise as q

from . import slow
from .layers import drawn

HALVES = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
"""Every number of fp16: subnormals, ties and neighbours of every FP8 number among them."""
FINITE = HALVES[HALVES.isfinite()].float()
RAGGED = [*random.Random(0).sample(range(1, 301), 10), 1, 127, 128, 129, 256, 300]


@pytest.mark.parametrize("form", [number_formats.E4M3, number_formats.E5M2])
def test_the_grid_is_torchs_own(form: number_formats.Format) -> None:
    """Every fp16 number within the range; beyond it the largest one, where torch's cast would give NaN or infinity."""
    assert form.dtype is not None
    own = number_formats.onto_grid_(FINITE.clone(), form)
    assert torch.equal(own, FINITE.clamp(-form.largest, form.largest).to(form.dtype).float())
    assert own.abs().max() == form.largest == torch.finfo(form.dtype).max


@pytest.mark.parametrize("form", ["e4m3", "e5m2", "e5m6"])
def test_the_grid_is_that_of_the_list_of_numbers(form: str) -> None:
    """Ties to even and subnormals included; every number of the list stays as it is."""
    values = FINITE[torch.randperm(len(FINITE), generator=torch.Generator().manual_seed(0))[:4000]]
    expected = torch.tensor([slow.nearest(float(v), form) for v in values])
    assert torch.equal(
        number_formats.onto_grid_(values.clone(), number_formats.FORMATS[form]), expected
    )
    listed = torch.tensor(slow.numbers(form), dtype=torch.float32)
    assert torch.equal(
        number_formats.onto_grid_(listed.clone(), number_formats.FORMATS[form]), listed
    )


def test_ties_go_to_even_by_hand() -> None:
    given = torch.tensor([17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 2.0**-10 * 1.01, 448.0, 463.9])
    expected = torch.tensor([16.0, 20.0, -16.0, 0.0, 2.0**-8, 2.0**-9, 448.0, 448.0])
    assert torch.equal(number_formats.onto_grid_(given.clone(), number_formats.E4M3), expected)


@pytest.mark.parametrize("form", ["e4m3", "e5m2", "e5m6"])
def test_codes_hold_every_number_of_the_format(form: str) -> None:
    """Odd widths too, for those that are packed in pairs."""
    listed = torch.tensor(slow.numbers(form), dtype=torch.float32)
    both = torch.cat([listed, -listed, listed[:1]])[None]
    for x in (both, both[:, 1:]):
        codes = number_formats.encode(x, number_formats.FORMATS[form])
        assert torch.equal(
            number_formats.decode(codes, number_formats.FORMATS[form])[:, : x.shape[1]], x
        )
        assert codes.numel() == {"e4m3": 1, "e5m2": 1}.get(form, 1.5) * (
            x.shape[1] + (form == "e5m6") * (x.shape[1] % 2)
        )


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (128, 1), (128, 128), (1, 32), (0, 0)])
def test_ragged_sizes_against_loops(rows: int, columns: int, power_of_two: bool) -> None:
    """Values, scales and the shape of the scales, with edges in both directions."""
    draw = random.Random(rows + columns)
    for _ in range(3):
        height, width = draw.choice(RAGGED), draw.choice(RAGGED)
        x = drawn(height, width, seed=height)
        found = q.quantise(x, q.Tile(rows, columns), number_formats.E4M3, power_of_two=power_of_two)
        expected, scales = slow.quantised(x, rows, columns, power_of_two=power_of_two)
        assert found.scales.shape == (
            math.ceil(height / (rows or height)),
            math.ceil(width / (columns or width)),
        )
        assert found.scales.tolist() == scales
        close(q.dequantise(found), expected)
        close(
            q.rounded(x, q.Tile(rows, columns), number_formats.E4M3, power_of_two=power_of_two),
            expected,
        )


@pytest.mark.parametrize("size", sorted(set(RAGGED)))
def test_there_is_a_scale_for_every_tile(size: int) -> None:
    x = drawn(size, 301 - size)
    for tile in (q.ROW, q.BLOCK, q.COLUMN, q.Tile(1, 32), q.Tile(32, 1), q.WHOLE):
        shape = q.quantise(x, tile, number_formats.E4M3).scales.shape
        assert shape == (
            math.ceil(size / (tile.rows or size)),
            math.ceil((301 - size) / (tile.columns or 301)),
        )
        assert q.quantise(x[None].expand(3, -1, -1), tile, number_formats.E4M3).scales.shape == (
            3,
            *shape,
        )


def close(own: Tensor, expected: Tensor) -> None:
    """One fp32 rounding apart: codes are equal, and code * scale is rounded once."""
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.double(), expected, rtol=2**-24, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "ends", [[0, 130, 130, 300], [128, 256, 257, 290], [0, 0, 0, 0], [300, 300, 300, 300]]
)
def test_columns_restart_at_every_experts_first_row(ends: list[int]) -> None:
    """Rows are rounded as if each expert's were a matrix of their own; rows of no expert are 0, whatever they hold."""
    x = drawn(300, 7)
    x[ends[-1] :] = torch.nan
    own = q.rounded(x, q.COLUMN, number_formats.E4M3, ends_E=torch.tensor(ends, dtype=torch.int32))
    close(own, slow.quantised(x, 128, 1, groups=slow.spans(ends))[0])
    for begin, end in slow.spans(ends):
        assert torch.equal(own[begin:end], q.rounded(x[begin:end], q.COLUMN, number_formats.E4M3))
    assert not own[ends[-1] :].any()


def test_scales_that_are_powers_of_two_are_the_next_ones() -> None:
    amax = torch.tensor([448.0, 448.0 * (1 + 2**-22), 447.0, 1.0, 224.0, 3e38, 1e-30])
    scales = q.scales_of(amax, number_formats.E4M3, power_of_two=True)
    mantissa, _ = torch.frexp(scales)
    assert torch.equal(mantissa, torch.full_like(amax, 0.5))
    assert scales[:5].tolist() == [1.0, 2.0, 1.0, 2.0**-8, 0.5]
    assert ((scales >= amax / 448) & (scales < 2 * amax / 448)).all()


def test_with_powers_of_two_turning_the_tiles_adds_no_error() -> None:
    """1x128 to 128x1 (report, section 3.3.3): exact as long as codes stay normal; with fp32 scales it is not."""
    x = drawn(256, 256).sign() * (
        1 + 15 * torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    )
    for power_of_two in (True, False):
        once = q.rounded(x, q.ROW, number_formats.E4M3, power_of_two=power_of_two)
        twice = q.rounded(once, q.COLUMN, number_formats.E4M3, power_of_two=power_of_two)
        assert torch.equal(once, twice) == power_of_two


def test_zero_tiles_stay_zero_and_their_neighbours_are_not_touched() -> None:
    x = torch.zeros(2, 256)
    x[:, 128:] = drawn(2, 128)
    found = q.quantise(x, q.ROW, number_formats.E4M3)
    assert not q.dequantise(found)[:, :128].any()
    assert (found.scales > 0).all()
    assert torch.equal(
        q.dequantise(found)[:, 128:], q.rounded(x[:, 128:], q.ROW, number_formats.E4M3)
    )


@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e-20, 1e-30])
def test_small_gradients_are_not_crushed(size: float) -> None:
    """A minimum of 1e-4 for the largest magnitude, as inference kernels have it, would make all of these 0."""
    x = drawn(4, 256)
    small = q.rounded(x * size, q.ROW, number_formats.E4M3)
    assert slow.calc_diff(small / size, x) < 1e-3


def test_below_the_smallest_normal_scale_nothing_is_invented() -> None:
    """Subnormal fp32 numbers: they become 0 or numbers of their own size, and never infinite."""
    x = torch.tensor([[1e-45, -1e-40, 0.0, 1e-38]])
    y = q.rounded(x, q.ROW, number_formats.E4M3)
    assert y.isfinite().all()
    assert (y.abs() <= 2 * x.abs() + 2.0**-135).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_P50_a_tile_that_is_not_finite_becomes_nan_as_a_whole(value: float) -> None:
    """The cast alone would make 448 of an infinity; other tiles stay as they are."""
    x = drawn(3, 256)
    clean, x[1, 5] = x.clone(), value
    for form in (number_formats.E4M3, number_formats.E5M2, number_formats.E5M6):
        for y in (
            q.rounded(x, q.ROW, form),
            q.dequantise(q.quantise(x, q.ROW, form, power_of_two=True)),
        ):
            assert y[1, :128].isnan().all()
            assert y[1, 128:].isfinite().all()
        assert torch.equal(q.rounded(x, q.ROW, form)[2], q.rounded(clean, q.ROW, form)[2])
    assert q.rounded(x, q.WHOLE, number_formats.E4M3).isnan().all()
    assert torch.tensor(math.inf).to(torch.float8_e4m3fn).float() == 448  # why this must be tested


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_P50_also_where_the_scale_comes_from_earlier_steps(value: float) -> None:
    x = drawn(3, 5)
    x[0, 0] = value
    assert q.rounded(x, q.WHOLE, number_formats.E4M3, amax=torch.ones(1, 1)).isnan().all()


def test_P50_codes_are_clamped_to_the_largest() -> None:
    """An earlier step's largest value was 1: 4 and 1e9 saturate at it, and do not become NaN."""
    x = torch.tensor([[0.5, -4.0, 1e9, 1.0]])
    y = q.rounded(x, q.WHOLE, number_formats.E4M3, amax=torch.ones(1, 1))
    torch.testing.assert_close(y, torch.tensor([[0.5, -1.0, 1.0, 1.0]]))


def test_an_empty_matrix_is_no_error() -> None:
    for shape in ((0, 5), (5, 0), (0, 0)):
        for tile in (q.ROW, q.COLUMN, q.BLOCK, q.WHOLE):
            assert q.rounded(torch.empty(shape), tile, number_formats.E4M3).shape == shape


def test_the_operators_are_whole_to_a_compiler() -> None:
    """Schema, fakes and determinism as torch's own checker wants them."""
    x, ends = drawn(20, 140), torch.tensor([3, 3, 18], dtype=torch.int32)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.moeloom.rounded.default, (x, 1, 128, "e4m3", False, None, None), test_utils=utils
    )
    torch.library.opcheck(
        torch.ops.moeloom.rounded.default, (x, 8, 1, "e5m2", True, ends, None), test_utils=utils
    )
    for form in ("e4m3", "e5m6"):
        arguments = (x, 1, 128, form, False, None)
        torch.library.opcheck(
            torch.ops.moeloom.rounded_and_kept.default, arguments, test_utils=utils
        )
