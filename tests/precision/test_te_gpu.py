"""te_fp8 with the real Transformer Engine, on a GPU that it runs on: first against fp64, then a run, then resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, last_checkpoint
from torch import Tensor

from core.assemble import build, make
from core.contracts.component import Environment
from plugins.te_fp8.engine import SCALINGS, obstacle

from .test_te_wiring import SIXTEENS

CUDA = torch.cuda.is_available()
HERE = Environment("cuda" if CUDA else "cpu", torch.cuda.get_device_capability() if CUDA else None, torch.version.cuda)


@pytest.fixture(params=SCALINGS)
def scaling(request: pytest.FixtureRequest) -> str:
    """Every one that this machine can run; why it cannot is the reason of the skip."""
    if why := obstacle(request.param, HERE):
        pytest.skip(why)
    return str(request.param)


def calc_diff(x: Tensor, y: Tensor) -> float:
    """1 - 2<x, y> / (|x|^2 + |y|^2) in fp64."""
    x, y = x.detach().double(), y.detach().double()
    return float(1 - 2 * (x * y).sum() / (x.square() + y.square()).sum())


def precision(lab: Lab, scaling: str, stream: str = "bf16") -> Any:
    return make(lab.recipe(f"precision={{name: te_fp8, scaling: {scaling}, stream: {stream}}}").precision)


@pytest.mark.parametrize("stream", ["bf16", "fp32"])
@pytest.mark.parametrize("rows", [256, 37])
def test_the_three_products_are_fp8_and_no_worse(lab: Lab, scaling: str, stream: str, rows: int) -> None:
    """Each calc_diff lies under the limit for E4M3, and well above what a bf16 product would show."""
    made = precision(lab, scaling, stream)
    layer = made.linear(256, 512, "ffn.down", std=0.1).cuda()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[stream]
    x = torch.randn(rows, 256, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, 512, device="cuda", dtype=dtype)
    y = layer(x)
    y.backward(dy)
    weight = layer.weight.detach().double()
    right = (x.double() @ weight.T, dy.double() @ weight, dy.double().T @ x.double())
    for actual, expected in zip((y, x.grad, layer.weight.grad), right, strict=True):
        assert 1e-5 < calc_diff(actual, expected) < 1.5e-3
    assert made.paths.table() == {"ffn.down": f"Transformer Engine, {SCALINGS[scaling].recipe}"}


@pytest.mark.parametrize("ends", [[100, 100, 133, 200], [0, 0, 0, 200], [50, 100, 150, 180], [0, 0, 0, 0]])
def test_experts(lab: Lab, scaling: str, ends: list[int]) -> None:
    layer = precision(lab, scaling, "fp32").grouped_linear(4, 128, 192, "experts.down", std=0.1).cuda()
    x = torch.randn(200, 128, device="cuda")
    x[ends[-1] :] = torch.nan
    x.requires_grad_()
    y = layer(x, torch.tensor(ends, device="cuda", dtype=torch.int32))
    dy = torch.randn(200, 192, device="cuda")
    y.backward(dy)
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert not y[ends[-1] :].any()
    assert not x.grad[ends[-1] :].any()
    for expert, (b, e) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        weight, own = layer.weight.detach()[expert].double(), layer.weight.grad[expert]
        if b == e:
            assert not own.any()
            continue
        assert calc_diff(y[b:e], x[b:e].double() @ weight.T) < 1.5e-3
        assert calc_diff(x.grad[b:e], dy[b:e].double() @ weight) < 1.5e-3
        assert calc_diff(own, dy[b:e].double().T @ x[b:e].double()) < 1.5e-3


def test_nan_goes_through(lab: Lab, scaling: str) -> None:
    layer = precision(lab, scaling).linear(256, 128, "ffn.down", std=0.1).cuda()
    x = torch.ones(64, 256, device="cuda", dtype=torch.bfloat16)
    x[3, 5] = torch.nan
    assert layer(x)[3].isnan().all()


def test_a_run_trains_recomputes_and_reaches_other_precisions(lab: Lab, scaling: str, tmp_path: Path) -> None:
    if scaling == "mxfp8":
        pytest.skip("the small recipe has widths of 16")
    te = (*SIXTEENS, f"precision={{name: te_fp8, scaling: {scaling}}}")
    again = () if scaling == "delayed" else ("recompute.blocks=[dense, moe]",)
    summary = lab.fit(tmp_path / "run", *te, *again, "budget.steps=6")
    assert "Transformer Engine" in summary["precision_paths"]["experts.gate_up"]
    state = {n.removeprefix("model."): t for n, t in last_checkpoint(tmp_path / "run")["state_dict"].items()}
    there = build(lab.recipe(*SIXTEENS))
    assert list(there.state_dict()) == list(state)
    there.load_state_dict(state)
