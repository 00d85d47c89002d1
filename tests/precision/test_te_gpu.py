"""te_fp8 with the real Transformer Engine, on a GPU that it runs on: against fp64, then runs, one of them resumed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, assert_same, assert_same_run, last_checkpoint
from torch import Tensor

from core.assemble import build, make
from core.contracts.component import Environment
from core.model.parameters import named_parameters
from core.training.callbacks import KeepLatest
from plugins.te_fp8.engine import SCALINGS, unmet_requirement

from .test_te_wiring import SIXTEENS

CUDA = torch.cuda.is_available()
HERE = Environment(
    "cuda" if CUDA else "cpu",
    torch.cuda.get_device_capability() if CUDA else None,
    torch.version.cuda,
)


@pytest.fixture(params=SCALINGS)
def scaling(request: pytest.FixtureRequest) -> str:
    """Every one that this machine can run; why it cannot is the reason of the skip."""
    if why := unmet_requirement(request.param, HERE):
        pytest.skip(why)
    return str(request.param)


def calc_diff(x: Tensor, y: Tensor) -> float:
    """1 - 2<x, y> / (|x|^2 + |y|^2) in fp64."""
    x, y = x.detach().double(), y.detach().double()
    return float(1 - 2 * (x * y).sum() / (x.square() + y.square()).sum())


def precision(lab: Lab, scaling: str, stream: str = "bf16") -> Any:
    return make(
        lab.recipe(f"precision={{name: te_fp8, scaling: {scaling}, stream: {stream}}}").precision
    )


@pytest.mark.parametrize("stream", ["bf16", "fp32"])
@pytest.mark.parametrize("rows", [256, 37])
def test_the_three_products_are_fp8_and_no_worse(
    lab: Lab, scaling: str, stream: str, rows: int
) -> None:
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
    assert made.kernels_used.table() == {
        "ffn.down": f"Transformer Engine, {SCALINGS[scaling].recipe}"
    }


@pytest.mark.parametrize(
    "ends", [[100, 100, 133, 200], [0, 0, 0, 200], [50, 100, 150, 180], [0, 0, 0, 0]]
)
def test_experts(lab: Lab, scaling: str, ends: list[int]) -> None:
    layer = (
        precision(lab, scaling, "fp32").grouped_linear(4, 128, 192, "experts.down", std=0.1).cuda()
    )
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


@pytest.mark.parametrize("keys", [{"gradients": "e5m2"}, {"scales": "fp32"}], ids=str)
def test_options(lab: Lab, scaling: str, keys: dict[str, str]) -> None:
    """E5M2 gradients cost bits in the two products that have them, and in no other; fp32 scales cost none."""
    if "scales" in keys and scaling != "block":
        pytest.skip("fp32 scales are of scaling block")
    text = ", ".join(
        f"{key}: {value}" for key, value in {"scaling": scaling, "stream": "fp32", **keys}.items()
    )
    made: Any = make(lab.recipe(f"precision={{name: te_fp8, {text}}}").precision)
    layer = made.linear(256, 512, "ffn.down", std=0.1).cuda()
    x = torch.randn(256, 256, device="cuda", requires_grad=True)
    dy = torch.randn(256, 512, device="cuda")
    y = layer(x)
    y.backward(dy)
    weight = layer.weight.detach().double()
    assert 1e-5 < calc_diff(y, x.double() @ weight.T) < 1.5e-3
    low, high = (1.5e-3, 4e-3) if "gradients" in keys else (1e-5, 1.5e-3)
    assert low < calc_diff(x.grad, dy.double() @ weight) < high
    assert low < calc_diff(layer.weight.grad, dy.double().T @ x.double()) < high
    assert made.kernels_used.table()["ffn.down"].endswith(
        "E5M2 gradients" if "gradients" in keys else "fp32 scales"
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_goes_through(lab: Lab, scaling: str, bad: float) -> None:
    """Non-finite activations and gradients make everything that depends on them non-finite."""
    layer = precision(lab, scaling).linear(256, 128, "ffn.down", std=0.1).cuda()
    x = torch.ones(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        x[3, 5] = bad
    assert not layer(x)[3].isfinite().any()
    with torch.no_grad():
        x[3, 5] = 1.0
    y, dy = layer(x), torch.ones(64, 128, device="cuda", dtype=torch.bfloat16)
    dy[7, 9] = bad
    y.backward(dy)
    assert not x.grad[7].isfinite().any()
    assert not layer.weight.grad[9].isfinite().any()


def test_a_run_trains_recomputes_and_reaches_other_precisions(
    lab: Lab, scaling: str, tmp_path: Path
) -> None:
    if scaling == "mxfp8":
        pytest.skip("the small recipe has widths of 16")
    te = (*SIXTEENS, f"precision={{name: te_fp8, scaling: {scaling}}}")
    again = () if scaling == "delayed" else ("recompute.blocks=[dense, moe]",)
    summary = lab.fit(tmp_path / "run", *te, *again, "budget.steps=6")
    assert "Transformer Engine" in summary["precision_paths"]["experts.gate_up"]
    state = {
        n.removeprefix("model."): t
        for n, t in last_checkpoint(tmp_path / "run")["state_dict"].items()
    }
    there = build(lab.recipe(*SIXTEENS))
    assert list(there.state_dict()) == list(state)
    there.load_state_dict(state)


class Cut(Exception):  # noqa: N818
    """What ends a run before its time."""


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What cuBLAS requires, and torch's switch as it was afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_a_run_that_is_cut_goes_on_to_the_same_bits(
    lab: Lab, scaling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed from its third step of six; and fp32's optimizer takes the moments that it left."""
    if scaling == "mxfp8":
        pytest.skip("the small recipe has widths of 16")
    te = (
        *SIXTEENS,
        f"precision={{name: te_fp8, scaling: {scaling}}}",
        "trainer.deterministic=true",
    )
    te += ("budget.steps=6", "checkpoint.every_steps=3")
    lab.fit(tmp_path / "whole", *te)
    saves = KeepLatest.on_train_batch_end

    def ends(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
        saves(self, trainer, module, *rest)
        if module.windows_done == 4:
            raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(KeepLatest, "on_train_batch_end", ends)
        with pytest.raises(Cut):
            lab.fit(tmp_path / "cut", *te)
    lab.fit(tmp_path / "cut", *te, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    recipe = lab.recipe(*SIXTEENS)
    model, kept = build(recipe), last_checkpoint(tmp_path / "whole")["optimizer_states"][0]
    optimizer = make(recipe.optimizer).make(named_parameters(model))
    optimizer.load_state_dict(kept)
    assert_same(optimizer.state_dict()["state"], kept["state"])
