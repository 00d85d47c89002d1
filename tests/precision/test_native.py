"""fp8_native: its three products against fp64 products of operands that are quantised here, tile by tile in loops.

On a CPU torch has the scales of `row` and `tensor`, which run for real. Those of `tile` run against a stand-in that
checks what CUDA checks, and for real where there is a Hopper GPU.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from torch import Tensor
from torch.nn import functional as F

from core.assemble import build, make
from core.contracts.component import Environment
from core.contracts.precision import Precision
from plugins.fp8_native import operand, precision
from plugins.fp8_native.precision import NativeFP8

from .layers import through
from .native_standin import hopper_scaled_mm

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICES = [
    "standin",
    pytest.param("cuda", marks=pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")),
]
CPU_LACKS = precision.missing("row", "cpu") or precision.missing("tensor", "cpu")
on_a_cpu = pytest.mark.skipif(CPU_LACKS is not None, reason=str(CPU_LACKS))
"""torch 2.11 has no `scaled_mm` for CPUs."""
PLAIN = [pytest.param("cpu", marks=on_a_cpu), DEVICES[1]]
"""Devices of the scales that CPUs have too."""
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the messages of a machine without a GPU"
)

SIZES: dict[str, tuple[int, int, int]] = {
    "ragged": (37, 200, 150),
    "whole": (128, 256, 128),
    "one of each": (1, 1, 1),
    "wide": (20, 700, 40),
    "long": (300, 30, 260),
}
"""Rows, inputs, outputs."""


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the products: a GPU, or a CPU with a stand-in for Hopper's `scaled_mm`."""
    if request.param == "standin":
        monkeypatch.setattr(operand.F, "scaled_mm", hopper_scaled_mm)
        monkeypatch.setattr(precision, "takes", lambda rounding, x: True)
    return "cuda" if request.param == "cuda" else "cpu"


def quantised(x: Tensor, rows: int, columns: int, *, ue8m0: bool = False) -> Tensor:
    """code * scale in fp64, one tile after the other; 0 for a whole axis."""
    rows, columns = rows or max(len(x), 1), columns or max(x.shape[1], 1)
    result = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i : i + rows, j : j + columns].float()
            scale = tile.abs().max() / 448
            if ue8m0:
                scale = (
                    torch.tensor(2.0 ** math.ceil(math.log2(float(scale)))) if scale > 0 else scale
                )
            if scale > 0:
                codes = (tile / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                result[i : i + rows, j : j + columns] = codes.double() * scale.double()
    return result


TILE = {"rows": (1, 128), "weight": (128, 128), "back": (128, 128), "columns": (128, 1)}
ROW = {"rows": (1, 0), "weight": (1, 0), "back": (0, 1), "columns": (0, 1)}
TENSOR = {"rows": (0, 0), "weight": (0, 0), "back": (0, 0), "columns": (0, 0)}


def by_hand(
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    how: dict[str, tuple[int, int]],
    *,
    paper: bool,
    ue8m0: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, dX and dW of one matrix in fp64."""

    def q(t: Tensor, part: str) -> Tensor:
        return quantised(t, *how[part], ue8m0=ue8m0)

    again = q(x, "rows").float() if paper else x
    y = q(x, "rows") @ q(weight, "weight").T
    dx = q(dy, "rows") @ q(weight, "back")
    return y, dx, q(dy, "columns").T @ (q(x, "rows") if how is TENSOR else q(again, "columns"))


ROUNDING = 4e-6
"""Error of fp32 sums, relative to |a| |b|."""


def worst(actual: Tensor, right: Tensor, size: Tensor) -> float:
    """The largest error, relative to `size`, which is |a| |b|."""
    error = (actual.detach().cpu().double() - right).abs() / size.double().clamp(min=1e-30)
    return float(error.max()) if right.numel() else 0.0


def close(
    found: Sequence[Tensor], right: list[Tensor], sizes: list[Tensor], limits: list[float]
) -> None:
    """Each within its limit."""
    errors = [worst(*each) for each in zip(found, right, sizes, strict=True)]
    assert all(error <= limit for error, limit in zip(errors, limits, strict=True)), (
        errors,
        limits,
    )


def limits(
    lab: Lab,
    device: str,
    keys: list[str],
    layer: Any,
    right: list[Tensor],
    sizes: list[Tensor],
    *given: Tensor,
) -> list[float]:
    """The rounding of fp32 sums; on a GPU, half as much again as sums of 14 bits are off in the same products.

    A Hopper's tensor core adds 32 products at once and cuts all of them 13 bits below the largest (report, section
    3.5.2), which the emulation does too: with one large channel among small ones it errs by 2.3e-3, an H100 by 2.2e-3.

    Args:
        keys: recipe keys of the precision; the emulation has one scale for a tensor instead of one for each row.
        layer: whose products they are.
        given: x, dy and, for experts, their ends.
    """
    if device == "cpu":
        return [ROUNDING] * 3
    tensor = (
        ["precision.scaling=tensor"]
        if {"precision.scaling=row", "precision.scaling=tensor"} & set(keys)
        else []
    )
    options = [key for key in keys if "scaling" not in key]
    narrow = ["precision.accumulator_bits=14", "precision.promote_every=128"]
    made: Any = make(
        lab.recipe("precision.name=fp8_emulated", *narrow, *tensor, *options).precision
    )
    if layer.weight.ndim == 2:
        like = made.linear(layer.inputs, layer.outputs, "ffn.down", std=0.1)
    else:
        like = made.grouped_linear(
            layer.groups, layer.inputs, layer.outputs, "experts.down", std=0.1
        )
    like.load_state_dict(layer.state_dict())
    found = through(like, *given)
    return [1.5 * worst(*each) + ROUNDING for each in zip(found, right, sizes, strict=True)]


def sizes_of(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """|a| |b| of the three products."""
    x, weight, dy = (t.abs().double() for t in (x, weight, dy))
    return [x @ weight.T, dy @ weight, dy.T @ x]


def data(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Rows and gradients with an outlier, some zeros, and very small numbers."""
    draw = torch.Generator().manual_seed(rows + inputs)
    x, dy = (torch.randn(rows, width, generator=draw) for width in (inputs, outputs))
    x[:, inputs // 2] *= 1e3
    x[rows // 2] *= 1e-6
    dy[rows // 3] = 0
    return x, dy * 1e-4


def native(lab: Lab, *overrides: str) -> Precision:
    made: Precision = make(
        lab.recipe("precision={name: fp8_native, stream: fp32}", *overrides).precision
    )
    return made


def check_linear(
    lab: Lab,
    sizes: tuple[int, int, int],
    how: dict[str, tuple[int, int]],
    device: str,
    *overrides: str,
) -> None:
    _, inputs, outputs = sizes
    torch.manual_seed(1)
    layer: Any = native(lab, *overrides).linear(inputs, outputs, "ffn.down", std=0.1).to(device)
    x, dy = data(*sizes)
    found = through(layer, x.to(device), dy.to(device))
    weight = layer.weight.detach().cpu()
    paper, ue8m0 = (
        "precision.weight_gradient=te" not in overrides,
        "precision.scales=ue8m0" in overrides,
    )
    right, size = (
        list(by_hand(x, weight, dy, how, paper=paper, ue8m0=ue8m0)),
        sizes_of(x, weight, dy),
    )
    close(found, right, size, limits(lab, device, [*overrides], layer, right, size, x, dy))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_the_three_products_in_tiles(lab: Lab, device: str, sizes: tuple[int, int, int]) -> None:
    check_linear(lab, sizes, TILE, device)


@pytest.mark.parametrize("override", ["precision.weight_gradient=te", "precision.scales=ue8m0"])
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_the_options_of_tiles(lab: Lab, device: str, override: str) -> None:
    check_linear(lab, SIZES["ragged"], TILE, device, override)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("scaling", "how"), [("row", ROW), ("tensor", TENSOR)])
@pytest.mark.parametrize("device", PLAIN, indirect=True)
def test_the_three_products_by_rows_and_by_tensors(
    lab: Lab,
    device: str,
    scaling: str,
    how: dict[str, tuple[int, int]],
    sizes: tuple[int, int, int],
) -> None:
    check_linear(lab, sizes, how, device, f"precision.scaling={scaling}")


ENDS = {
    "ragged": ([5, 5, 150, 170], 170),
    "empty": ([0, 0, 0, 0], 0),
    "one owner": ([0, 33, 33, 33], 40),
}


def check_grouped(
    lab: Lab,
    ends: list[int],
    rows: int,
    how: dict[str, tuple[int, int]],
    device: str,
    *overrides: str,
) -> None:
    layer: Any = (
        native(lab, *overrides).grouped_linear(4, 70, 40, "experts.down", std=0.1).to(device)
    )
    x, dy = data(max(rows, 1), 70, 40)
    x, dy = x[:rows], dy[:rows]
    own, ends_E = x.clone(), torch.tensor(ends, dtype=torch.int32)
    own[ends[-1] :] = torch.nan
    found = through(layer, own.to(device), dy.to(device), ends_E.to(device))
    weight = layer.weight.detach().cpu()
    right = [torch.zeros(t.shape, dtype=torch.float64) for t in (dy, x, weight)]
    sizes = [torch.zeros_like(t) for t in right]
    if how is TENSOR:  # one scale for the rows of all experts
        rows_q, dy_q = (quantised(t[: ends[-1]], 0, 0) for t in (x, dy))
    for expert, (b, e) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if e > b and how is TENSOR:
            w = quantised(weight[expert], 0, 0)
            own_right = (rows_q[b:e] @ w.T, dy_q[b:e] @ w, dy_q[b:e].T @ rows_q[b:e])
        elif e > b:
            own_right = by_hand(x[b:e], weight[expert], dy[b:e], how, paper=True)
        else:
            continue
        for all_of, parts in (
            (right, own_right),
            (sizes, sizes_of(x[b:e], weight[expert], dy[b:e])),
        ):
            all_of[0][b:e], all_of[1][b:e], all_of[2][expert] = parts
    assert all(bool(torch.isfinite(t).all()) for t in found)
    close(
        found, right, sizes, limits(lab, device, [*overrides], layer, right, sizes, x, dy, ends_E)
    )


@pytest.mark.parametrize(("ends", "rows"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_experts_in_tiles(lab: Lab, device: str, ends: list[int], rows: int) -> None:
    check_grouped(lab, ends, rows, TILE, device)


@pytest.mark.parametrize(("ends", "rows"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(("scaling", "how"), [("row", ROW), ("tensor", TENSOR)])
@pytest.mark.parametrize("device", PLAIN, indirect=True)
def test_experts_by_rows_and_by_tensors(
    lab: Lab, device: str, scaling: str, how: dict[str, tuple[int, int]], ends: list[int], rows: int
) -> None:
    check_grouped(lab, ends, rows, how, device, f"precision.scaling={scaling}")


@on_a_cpu
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_every_experts_operands_are_aligned(
    lab: Lab, scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS has no algorithm for a scale in memory between others (seen on an H100); a CPU does not mind."""
    places: list[int] = []

    def spied(
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        kind_a: Any,
        scale_b: Tensor,
        kind_b: Any,
        **more: Any,
    ) -> Tensor:
        places.extend(t.data_ptr() for t in (a, b, scale_a, scale_b))
        return real(a, b, scale_a, kind_a, scale_b, kind_b, **more)

    real = operand.F.scaled_mm
    monkeypatch.setattr(operand.F, "scaled_mm", spied)
    check_grouped(
        lab,
        *ENDS["ragged"],
        ROW if scaling == "row" else TENSOR,
        "cpu",
        f"precision.scaling={scaling}",
    )
    assert len(places) == 4 * 9
    assert all(place % 16 == 0 for place in places)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_it_is_what_the_emulation_emulates(lab: Lab, device: str) -> None:
    """The same three products as `fp8_emulated` with its defaults, up to the order of sums."""
    here: Any = native(lab).linear(200, 150, "ffn.down", std=0.1).to(device)
    there: Any = make(lab.recipe("precision.name=fp8_emulated").precision).linear(
        200, 150, "ffn.down", std=0.1
    )
    there.load_state_dict(here.state_dict())
    x, dy = data(37, 200, 150)
    found, right = (
        through(here, x.to(device), dy.to(device)),
        [t.double() for t in through(there, x, dy)],
    )
    sizes = sizes_of(x, there.weight.detach(), dy)
    close(found, right, sizes, limits(lab, device, [], here, right, sizes, x, dy))


@on_a_cpu
@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(lab: Lab, scaling: str, bad: float) -> None:
    layer = native(lab, f"precision.scaling={scaling}").linear(32, 16, "ffn.down", std=0.1)
    x = torch.ones(4, 32)
    x[1, 3] = bad
    y = layer(x)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2, 3]].isfinite().all()) == (scaling == "row")


@on_a_cpu
def test_outputs_are_in_the_streams_format_and_gradients_of_masters_fp32(lab: Lab) -> None:
    made = native(lab, "precision.scaling=row", "precision.stream=bf16")
    layer: Any = made.linear(32, 16, "ffn.down", std=0.1)
    x = torch.ones(4, 32, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


# The precision


def needs(scaling: str, *environment: Any) -> str | None:
    return NativeFP8.requires(NativeFP8.Config(scaling=scaling), Environment(*environment))


@pytest.mark.parametrize(
    ("scaling", "environment", "sentence"),
    [
        (
            "tile",
            ("cpu",),
            "has 1x128 and 128x128 scales on Hopper GPUs, and none on CPUs; scaling row and tensor run",
        ),
        (
            "tile",
            ("cuda", (10, 0), "13.0"),
            "on compute capability 9.0 alone (Hopper), and this GPU has 10.0",
        ),
        ("tile", ("cuda", (8, 9), "12.9"), "this GPU has 8.9; precision fp8_emulated"),
        (
            "row",
            ("cuda", (8, 9), "12.9"),
            "has what scaling row needs on compute capability 9.0 alone",
        ),
        pytest.param("row", ("cpu",), None, marks=on_a_cpu),
        pytest.param("tensor", ("cpu",), None, marks=on_a_cpu),
    ],
)
def test_what_a_device_must_have(
    scaling: str, environment: tuple[Any, ...], sentence: str | None
) -> None:
    reason = needs(scaling, *environment)
    assert (reason is None) if sentence is None else (reason is not None and sentence in reason), (
        reason
    )


@pytest.mark.parametrize(
    "error", [ValueError("Invalid scaling\nconfiguration"), RuntimeError("cublasLt >= 12.9")]
)
def test_a_torch_that_cannot_is_found_by_one_small_product(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: Any, **__: Any) -> Tensor:
        raise error

    monkeypatch.setattr(operand.F, "scaled_mm", failing)
    reason = needs("row", "cpu")
    assert reason is not None
    assert f"no scaled_mm for scaling row here ({str(error).splitlines()[0]})" in reason
    monkeypatch.delattr(operand.F, "scaled_mm")
    reason = needs("row", "cpu")
    assert reason is not None
    assert "scaled_mm" in reason


@pytest.mark.parametrize("kind", ["BlockWise1x128", "BlockWise128x128"])
def test_scales_in_another_order_are_found_too(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(operand.F, "scaled_mm", hopper_scaled_mm)
    assert precision.missing("tile", "cpu") is None
    real = operand._laid_out

    def turned(laid: Any) -> Tensor:
        scales = real(laid)
        if operand.KINDS[laid.tile].name == kind:
            scales.copy_(scales.flip(0).flip(1).clone())
        return scales

    monkeypatch.setattr(operand, "_laid_out", turned)
    reason = precision.missing("tile", "cpu")
    assert reason is not None
    assert "(its results are wrong)" in reason


@without_gpu
def test_tiles_on_a_cpu_are_refused_by_fit_and_described(lab: Lab, tmp_path: Path) -> None:
    result = lab.command("fit", lab.file, "precision.name=fp8_native", "--out", tmp_path / "run")
    assert result.code == 2
    assert (
        "precision fp8_native: torch's scaled_mm has 1x128 and 128x128 scales on Hopper GPUs"
        in result.sentence
    )
    assert not (tmp_path / "run").exists()
    assert lab.command("describe", lab.file, "precision.name=fp8_native").code == 0


@pytest.mark.full
@on_a_cpu
def test_a_run_trains_and_says_which_code_ran(lab: Lab) -> None:
    overrides = ("precision={name: fp8_native, scaling: row, stream: fp32}", "budget.steps=2")
    module = lab.train(*overrides)
    table = module.model.kernels_used().table()
    assert table["experts.gate_up"] == table["ffn.down"] == "torch scaled_mm, e4m3 rows"
    assert table["head"] == "float32 product"
    again = lab.train(*overrides, "recompute.blocks=[dense, moe]")
    for one, two in zip(module.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
def test_a_run_in_tiles(lab: Lab, tmp_path: Path) -> None:
    summary = lab.fit(
        tmp_path / "run",
        "precision={name: fp8_native}",
        "recompute.blocks=[dense, moe]",
        "budget.steps=6",
    )
    by = "Triton" if find_spec("triton") else "torch"
    expected = f"torch scaled_mm, e4m3 1x128 / 128x128, operands by {by}"
    assert expected in summary["precision_paths"]["experts.gate_up"].split(" | ")
    assert summary["skipped_steps"] == 0


def test_in_tiles_a_cpu_takes_plain_products_and_says_so(lab: Lab) -> None:
    made = native(lab)
    layer = made.linear(32, 16, "ffn.down", std=0.1)
    x = torch.ones(3, 32)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    made.grouped_linear(2, 32, 16, "experts.down", std=0.1)(x, torch.tensor([1, 3]))
    assert made.kernels_used.table() == {
        "ffn.down": "float32 product",
        "experts.down": "float32 product",
    }


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_in_tiles_a_run_says_who_made_the_operands(lab: Lab, device: str) -> None:
    made = native(lab)
    made.linear(32, 16, "ffn.down", std=0.1)(torch.ones(3, 32))
    made.grouped_linear(2, 32, 16, "experts.down", std=0.1)(torch.ones(3, 32), torch.tensor([1, 3]))
    kernel = "torch scaled_mm, e4m3 1x128 / 128x128"
    assert made.path("ffn.down") == made.path("experts.down") == kernel
    assert made.kernels_used.table() == dict.fromkeys(
        ("ffn.down", "experts.down"), f"{kernel}, operands by torch"
    )


def test_names_and_initial_values_are_those_of_fp32(lab: Lab) -> None:
    here, there = build(lab.recipe("precision.name=fp8_native")), build(lab.recipe())
    assert list(here.state_dict()) == list(there.state_dict())
    for name, value in there.state_dict().items():
        assert torch.equal(here.state_dict()[name], value), name
