"""A GPU gives the same codes and scales as a CPU, the same products up to fp32 sums, the same bits every time."""

from typing import Any

import pytest
import torch

from core.numerics import number_formats
from core.numerics import quantise as q

from .layers import drawn, precision, through, with_weight
from .slow import calc_diff

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [q.ROW, q.COLUMN, q.BLOCK, q.WHOLE, q.Tile(1, 32)], ids=str)
@pytest.mark.parametrize("form", [number_formats.E4M3, number_formats.E5M2, number_formats.E5M6])
def test_codes_and_scales_are_those_of_a_cpu(
    form: number_formats.Format, tile: q.Tile, power_of_two: bool
) -> None:
    """Zero and infinite tiles included. Divided by a Python number, CUDA's scales would be one bit off."""
    x = drawn(300, 333)
    x[5], x[7, 3] = 0, torch.inf
    here, there = (q.quantise(t, tile, form, power_of_two=power_of_two) for t in (x, x.cuda()))
    assert torch.equal(here.scales.nan_to_num(-1), there.scales.cpu().nan_to_num(-1))
    for one, two in ((q.dequantise(here), q.dequantise(there)),):
        assert torch.equal(one.nan_to_num(-1), two.cpu().nan_to_num(-1))


KEYS: list[dict[str, Any]] = [
    {},
    {"weight_gradient": "te"},
    {"scaling": "delayed"},
    {"scaling": "mxfp8"},
    {"accumulator_bits": 14},
]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_products_are_those_of_a_cpu(
    keys: dict[str, Any], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes with deterministic algorithms give the same bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    x, dy, ends = (
        drawn(300, 200),
        drawn(300, 72),
        torch.tensor([10, 10, 141, 290], dtype=torch.int32),
    )
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for device in ("cpu", "cuda", "cuda"):
            made = precision(**keys)
            layer = made.grouped_linear(4, 200, 72, "experts.down", std=0.1) if grouped else None
            layer = with_weight(layer or made.linear(200, 72, "attention.output", std=0.1)).to(
                device
            )
            more = (ends.to(device),) if grouped else ()
            found.append(through(layer, x.to(device), dy.to(device), *more))
    finally:
        torch.use_deterministic_algorithms(False)
    for here, there, again in zip(*found, strict=True):
        assert calc_diff(there.cpu(), here) < 1e-10
        assert torch.equal(there, again)
