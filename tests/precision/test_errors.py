"""How far FP8 products are from those of unrounded operands: the limits of the specification, and narrow sums."""

from typing import Any

import pytest
import torch
from torch import Tensor

from core.contracts.errors import UserError
from core.numerics.number_formats import E4M3, E5M2, Format
from core.numerics.quantise import BLOCK, ROW, WHOLE, Tile, rounded

from .layers import drawn, precision, through, with_weight
from .slow import calc_diff

M, N, K = 256, 256, 1024


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(tile_x: Tile, tile_w: Tile, form: Format = E4M3, **options: Any) -> float:
    """calc_diff of one product of normal numbers against fp64 of the unquantised ones."""
    x, w = normal(M, K, seed=0), normal(N, K, seed=1)
    own = rounded(x, tile_x, form, **options) @ rounded(w, tile_w, form, **options).T
    return calc_diff(own, x.double() @ w.double().T)


def test_A16_tiles_of_e4m3_are_within_a_thousandth_and_e5m2_is_not() -> None:
    """The specification measured 6.7e-4, 6.9e-4 with powers of two, and 2.65e-3."""
    assert error(ROW, BLOCK) == pytest.approx(6.7e-4, rel=0.05)
    assert error(ROW, BLOCK, power_of_two=True) < 1e-3
    assert error(ROW, BLOCK, E5M2) == pytest.approx(2.65e-3, rel=0.05)


def test_P21_normal_numbers_do_not_report_tiles_from_tensors() -> None:
    assert error(WHOLE, WHOLE) < 1e-3


def test_A16_P21_an_outlier_does() -> None:
    """One input channel 1e5 times as large, whose weights are 0: tiles lose its tile, one scale loses everything."""
    x, w = normal(M, K, seed=0), normal(N, K, seed=1)
    x[:, 3] *= 1e5
    w[:, 3] = 0
    exact = x.double() @ w.double().T
    tile = calc_diff(rounded(x, ROW, E4M3) @ rounded(w, BLOCK, E4M3).T, exact)
    tensor = calc_diff(rounded(x, WHOLE, E4M3) @ rounded(w, WHOLE, E4M3).T, exact)
    assert tile < 3e-3
    assert tensor > 3e-2


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("keys", "limits"),
    [
        ({}, (1e-3, 1e-3, 1.25e-3)),
        ({"weight_gradient": "te"}, (1e-3, 1e-3, 1e-3)),
        ({"scales": "ue8m0"}, (1e-3, 1e-3, 1e-3)),
        ({"scaling": "mxfp8"}, (1e-3, 1e-3, 1e-3)),
        ({"scaling": "tensor"}, (1e-3, 1e-3, 1e-3)),
    ],
    ids=str,
)
def test_all_three_products_of_a_layer(
    keys: dict[str, Any], limits: tuple[float, ...], grouped: bool
) -> None:
    """Normal numbers; with fp32 scales the report's saved codes are rounded a third time for dW."""
    made, ends = precision(**keys), torch.tensor([100, 100, 300, 512], dtype=torch.int32)
    if grouped:
        layer, more = made.grouped_linear(4, 256, 192, "experts.down", std=0.1), (ends,)
    else:
        layer, more = made.linear(256, 192, "ffn.down", std=0.1), ()
    x, dy = normal(512, 256, seed=2), normal(512, 192, seed=3)
    for own, exact, limit in zip(
        through(layer, x, dy, *more), _exact(layer.weight, x, dy, more), limits, strict=True
    ):
        assert 1e-4 < calc_diff(own, exact) < limit


@pytest.mark.parametrize("part", [1, 2])
def test_gradients_in_e5m2_are_not_within_it(part: int) -> None:
    layer = precision(gradients="e5m2").linear(256, 192, "ffn.down", std=0.1)
    x, dy = normal(512, 256, seed=2), normal(512, 192, seed=3)
    own, exact = through(layer, x, dy), _exact(layer.weight, x, dy, ())
    assert calc_diff(own[0], exact[0]) < 1e-3 < calc_diff(own[part], exact[part]) < 3e-3


def _exact(
    weight: Tensor, x: Tensor, dy: Tensor, more: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    weight, x, dy = weight.detach().double(), x.double(), dy.double()
    if not more:
        return x @ weight.T, dy @ weight, dy.T @ x
    parts = [slice(a, b) for a, b in zip([0, *more[0].tolist()], more[0].tolist(), strict=False)]
    y = torch.cat([x[p] @ w.T for p, w in zip(parts, weight, strict=True)])
    dx = torch.cat([dy[p] @ w for p, w in zip(parts, weight, strict=True)])
    return y, dx, torch.stack([dy[p].T @ x[p] for p in parts])


# ---- sums of 14 bits


def sums(**keys: Any) -> tuple[Tensor, Tensor]:
    """Y of uniform numbers in [0, 1), K = 4096, by a layer of one scale, and fp64 of the same quantised operands."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.rand(16, 4096, generator=draw), torch.rand(16, 4096, generator=draw)
    layer = precision(scaling="tensor", **keys).linear(4096, 16, "ffn.down", std=0.1)
    with torch.no_grad():
        layer.weight.copy_(w)
        y = layer(x)
    return y.double(), rounded(x, WHOLE, E4M3).double() @ rounded(w, WHOLE, E4M3).double().T


def test_14_bit_sums_of_4096_are_percents_off_and_promotion_mends_it() -> None:
    """Largest relative error: the report says about 2% for numbers that it does not name, for these it is 7.75%."""
    without, exact = sums(accumulator_bits=14, promote_every=None)
    worst = ((without - exact) / exact).abs().max()
    assert worst == pytest.approx(0.0775, rel=0.02)
    assert (without < exact).all()  # cut off, not rounded: always too small
    promoted, exact = sums(accumulator_bits=14, promote_every=128)
    assert ((promoted - exact) / exact).abs().max() < 1e-3
    plain, exact = sums()
    assert ((plain - exact) / exact).abs().max() < 1e-5


def test_a_narrow_sum_by_hand() -> None:
    """5 bits, instructions of 32: 32 ones are 32, and beside 32 a one lies below the fifth bit, however many follow."""
    from plugins.fp8_emulated.accumulate import Scaled, accumulated

    def summed(count: int, bits: int, every: int | None) -> float:
        ones = Scaled(torch.ones(1, count), torch.full((1, count), 0.5))
        return float(accumulated(ones, ones, bits=bits, every=every))

    assert summed(32, 5, None) == 0.25 * 32
    assert summed(33, 5, None) == 0.25 * 32
    assert summed(34, 6, None) == 0.25 * 34
    assert summed(160, 5, None) == 0.25 * 32
    assert summed(160, 5, 32) == 0.25 * 160
    seven = torch.cat([torch.tensor([7.0]), torch.zeros(31), torch.ones(32)])[None]
    both = accumulated(
        Scaled(seven, torch.ones(1, 64)),
        Scaled(torch.ones(1, 64), torch.ones(1, 64)),
        bits=5,
        every=None,
    )
    assert (
        float(both) == 38
    )  # 7 and 32 ones fit beside each other, and their sum, 39, is cut once more


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "keys", [{}, {"weight_gradient": "te"}, {"scaling": "tensor"}, {"e5m6": ["ffn.*", "experts.*"]}]
)
def test_sums_of_many_bits_are_the_plain_ones(keys: dict[str, Any], grouped: bool) -> None:
    """18 bits against fp32: the same operands in the same places, in all three products."""
    x, dy, ends = (
        drawn(150, 140),
        drawn(150, 33),
        torch.tensor([10, 10, 141, 150], dtype=torch.int32),
    )
    found = []
    for more in ({}, {"accumulator_bits": 18}):
        made = precision(**keys, **more)
        layer = made.grouped_linear(4, 140, 33, "experts.down", std=0.1) if grouped else None
        layer = with_weight(layer or made.linear(140, 33, "ffn.down", std=0.1))
        found.append(through(layer, x, dy, *((ends,) if grouped else ())))
    for plain, narrow in zip(*found, strict=True):
        assert calc_diff(narrow, plain) < 1e-8
        assert not torch.equal(narrow, plain)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"accumulator_bits": 24}, "accumulator_bits = 24: must be from 4 to 18"),
        (
            {"accumulator_bits": 14, "promote_every": None},
            "promote_every = null: must be a number with tile scaling",
        ),
        (
            {"accumulator_bits": 14, "promote_every": 48},
            "promote_every = 48: must be 32, 64 or 128",
        ),
        ({"promote_every": 256}, "promote_every = 256: must be 32, 64 or 128"),
        (
            {"accumulator_bits": 14, "scaling": "mxfp8"},
            "accumulator_bits = 14: must be null with mxfp8",
        ),
        ({"history": 0}, "history = 0: must be at least 1"),
        (
            {"e5m6": ["attention.out"]},
            "e5m6.0 = 'attention.out': is not a role; did you mean attention.output",
        ),
    ],
)
def test_what_no_tensor_core_does_is_refused(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        precision(**keys)
    assert expected in str(caught.value)
