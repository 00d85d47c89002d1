"""The three products of every low layer against fp64 products of operands that loops have quantised (issue: FP8)."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tiers import first_by_default
from torch import Tensor

from .layers import drawn, precision, through, with_weight
from .slow import Groups, quantised, spans

PLAIN = [(5, 7, 3), (130, 128, 40), (129, 192, 130), (1, 300, 17), (256, 64, 128)]
"""Rows, inputs, outputs."""
ENDS = [[10, 10, 141, 150], [0, 0, 0, 150], [0, 128, 129, 150], [20, 20, 40, 77]]
"""The ends of four experts' rows, of 150; in the last case no expert owns the rest."""

TILE = {"row": (1, 128), "column": (128, 1), "weight": (128, 128), "weight_back": (128, 128)}
MX = {"row": (1, 32), "column": (32, 1), "weight": (1, 32), "weight_back": (32, 1)}
TENSOR = {"row": (0, 0), "column": (0, 0), "weight": (0, 0), "weight_back": (0, 0)}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, TILE),
    "te": ({"weight_gradient": "te"}, {**TILE, "saved": None}),
    "ue8m0": ({"scales": "ue8m0"}, {**TILE, "power_of_two": True}),
    "e5m2": ({"gradients": "e5m2"}, {**TILE, "gradients": "e5m2"}),
    "e5m6": ({"e5m6": ["ffn.*", "experts.*"]}, {**TILE, "saved": "e5m6"}),
    "mxfp8": ({"scaling": "mxfp8"}, {**MX, "power_of_two": True}),
    "mxfp8 te": (
        {"scaling": "mxfp8", "weight_gradient": "te"},
        {**MX, "power_of_two": True, "saved": None},
    ),
    "tensor": ({"scaling": "tensor"}, TENSOR),
    "tensor te": ({"scaling": "tensor", "weight_gradient": "te"}, {**TENSOR, "saved": None}),
    "tensor e5m6": (
        {"scaling": "tensor", "e5m6": ["ffn.down", "experts.down"]},
        {**TENSOR, "saved": "e5m6"},
    ),
    "delayed, first step": ({"scaling": "delayed"}, TENSOR),
}
ONE_EACH = ("paper", "mxfp8", "tensor e5m6")
"""A setting of each scaling."""


def operands(
    x: Tensor, weight: Tensor, dy: Tensor, how: Mapping[str, Any], groups: Groups | None
) -> dict[str, Tensor]:
    """What each product is taken of, in fp64, by the definitions.

    Args:
        weight: one expert's; every expert has blocks of its own.
        how: tiles, format of gradients, of scales, and of what is saved.
        groups: the rows of every expert; None for a plain layer.
    """
    two, saved, gradients = (
        how.get("power_of_two", False),
        how.get("saved", "e4m3"),
        how.get("gradients", "e4m3"),
    )
    whole = None if groups is None else [(0, groups[-1][1])]
    rows = whole if how["row"] == (0, 0) else None
    columns = whole if how["column"] == (0, 0) else groups
    found = {
        "x": quantised(x, *how["row"], power_of_two=two, groups=rows)[0],
        "dy": quantised(dy, *how["row"], gradients, power_of_two=two, groups=rows)[0],
        "w": quantised(weight, *how["weight"], power_of_two=two)[0],
        "w_back": quantised(weight, *how["weight_back"], power_of_two=two)[0],
        "dy_again": quantised(dy, *how["column"], gradients, power_of_two=two, groups=columns)[0],
    }
    stored = x
    if saved is not None:
        finer = saved == "e5m6"
        stored = quantised(x, *how["row"], saved, power_of_two=two or finer, groups=rows)[0]
    if saved == "e4m3" and how["row"] == how["column"]:
        return {**found, "x_again": stored}
    again = quantised(stored, *how["column"], power_of_two=two or saved == "e5m6", groups=columns)[
        0
    ]
    return {**found, "x_again": again}


def near(own: Tensor, exact: Tensor, size: Tensor) -> None:
    """fp32 sums of up to 300 products: relative to the sum of their magnitudes."""
    assert own.dtype == torch.float32
    assert ((own.double() - exact).abs() <= 2e-6 * size + 1e-30).all()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("sizes", first_by_default(PLAIN), ids=str)
def test_the_products_of_a_plain_layer(setting: str, sizes: tuple[int, int, int]) -> None:
    keys, how = SETTINGS[setting]
    rows, inputs, outputs = sizes
    layer = with_weight(precision(**keys).linear(inputs, outputs, "ffn.down", std=0.1))
    x, dy = drawn(rows, inputs, seed=2), drawn(rows, outputs, seed=3)
    y, dx, dw = through(layer, x, dy)
    q = operands(x, layer.weight, dy, how, None)
    near(y, q["x"] @ q["w"].T, q["x"].abs() @ q["w"].abs().T)
    near(dx, q["dy"] @ q["w_back"], q["dy"].abs() @ q["w_back"].abs())
    near(dw, q["dy_again"].T @ q["x_again"], q["dy_again"].abs().T @ q["x_again"].abs())


@pytest.mark.parametrize(
    "setting",
    first_by_default(sorted(SETTINGS, key=lambda name: name not in ONE_EACH), keep=len(ONE_EACH)),
)
@pytest.mark.parametrize("ends", first_by_default(ENDS), ids=str)
def test_the_products_of_a_grouped_layer(setting: str, ends: Sequence[int]) -> None:
    """Empty experts, ragged ones, and rows of no expert, which come out as 0 and set no scale."""
    keys, how = SETTINGS[setting]
    layer = with_weight(precision(**keys).grouped_linear(4, 140, 33, "experts.down", std=0.1))
    x, dy = drawn(150, 140, seed=2), drawn(150, 33, seed=3)
    x[ends[-1] :] = 1e6
    dy[ends[-1] :] = 1e6
    y, dx, dw = through(layer, x, dy, torch.tensor(ends, dtype=torch.int32))
    assert not y[ends[-1] :].any()
    assert not dx[ends[-1] :].any()
    for expert, (begin, end) in enumerate(spans(ends)):
        q, part = operands(x, layer.weight[expert], dy, how, spans(ends)), slice(begin, end)
        near(y[part], q["x"][part] @ q["w"].T, q["x"][part].abs() @ q["w"].abs().T)
        near(dx[part], q["dy"][part] @ q["w_back"], q["dy"][part].abs() @ q["w_back"].abs())
        size = q["dy_again"][part].abs().T @ q["x_again"][part].abs()
        near(dw[expert], q["dy_again"][part].T @ q["x_again"][part], size)


def test_the_emulation_of_bf16_rounds_operands_and_nothing_else() -> None:
    """All three products, bit by bit those of fp32 with operands that were rounded before."""
    layer = with_weight(precision("bf16_emulated").linear(40, 24, "ffn.down", std=0.1))
    x, dy = drawn(30, 40), drawn(30, 24)
    y, dx, dw = through(layer, x, dy)
    short_x, short_w, short_dy = (t.detach().bfloat16().float() for t in (x, layer.weight, dy))
    assert torch.equal(y, short_x @ short_w.T)
    assert torch.equal(dx, short_dy @ short_w)
    assert torch.equal(dw, short_dy.T @ short_x)
    assert not torch.equal(y, y.bfloat16().float())


@pytest.mark.parametrize("grouped", [False, True])
def test_a_bf16_stream_rounds_results_but_no_gradient_of_a_master(grouped: bool) -> None:
    """Report, section 3.3.1: weight gradients are fp32; bit by bit those of the same numbers in an fp32 stream."""
    x, dy = drawn(30, 40, seed=2).bfloat16(), drawn(30, 24, seed=3).bfloat16()
    found = []
    for stream, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        made, more = precision(stream=stream), ()
        layer = made.linear(40, 24, "ffn.down", std=0.1)
        if grouped:
            layer, more = (
                made.grouped_linear(2, 40, 24, "experts.down", std=0.1),
                (torch.tensor([11, 30]),),
            )
        found.append(through(with_weight(layer), x.to(dtype), dy.to(dtype), *more))
    wide, short = found
    for one, two in zip(short[:2], wide[:2], strict=True):
        assert torch.equal(one, two.bfloat16())
    assert torch.equal(short[2], wide[2])
    assert not torch.equal(short[2], short[2].bfloat16().float())


@pytest.mark.parametrize("name", ["fp8_emulated", "bf16_emulated"])
def test_leading_axes_are_rows(name: str) -> None:
    layer = with_weight(precision(name).linear(40, 24, "ffn.down", std=0.1))
    x, dy = drawn(6, 5, 40), drawn(6, 5, 24)
    whole, flat = through(layer, x, dy), through(layer, x.flatten(0, 1), dy.flatten(0, 1))
    for one, two in zip(whole, flat, strict=True):
        assert torch.equal(one.flatten(), two.flatten())


@pytest.mark.parametrize("role", ["router", "norm", "embedding", "head", "mtp.projection"])
def test_roles_that_stay_high_are_plain_fp32_products(role: str) -> None:
    layer, plain = (
        with_weight(precision(n).linear(40, 24, role, std=0.1)) for n in ("fp8_emulated", "fp32")
    )
    x, dy = drawn(30, 40), drawn(30, 24)
    for one, two in zip(through(layer, x, dy), through(plain, x, dy), strict=True):
        assert torch.equal(one, two)


def test_only_the_gradients_that_are_asked_for_are_taken() -> None:
    """And what the others would need is not kept."""
    layer = precision().linear(40, 24, "ffn.down", std=0.1)
    kept: list[Tensor] = []
    for needs_x, needs_w, count in ((True, False, 2), (False, True, 2), (True, True, 4)):
        kept.clear()
        layer.weight.requires_grad_(needs_w)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(drawn(30, 40).requires_grad_(needs_x))
        y.sum().backward()
        assert len(kept) == count
    with torch.no_grad():
        assert not layer(drawn(3, 40)).requires_grad


def test_autocast_changes_no_bit() -> None:
    layer = with_weight(precision().linear(40, 24, "ffn.down", std=0.1))
    x, dy = drawn(30, 40), drawn(30, 24)
    plain = through(layer, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        under = through(layer, x, dy)
    for one, two in zip(under, plain, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["fp8_emulated", "bf16_emulated"])
def test_a_product_is_deterministic(name: str) -> None:
    layer = with_weight(precision(name).grouped_linear(4, 140, 33, "experts.down", std=0.1))
    x, dy, ends = (
        drawn(150, 140),
        drawn(150, 33),
        torch.tensor([10, 10, 141, 150], dtype=torch.int32),
    )
    first = through(layer, x, dy, ends)
    for _ in range(3):
        for one, two in zip(through(layer, x, dy, ends), first, strict=True):
            assert torch.equal(one, two)
