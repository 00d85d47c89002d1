"""Number formats: what must never be cast, what stays in fp32 or wider, what an fp64 reference needs (P1, P14, P45)."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import rms_norm
from torch import Tensor, nn

import core
from core.contracts.build import Rope
from core.model.initialise import initialise
from core.model.language_model import LanguageModel
from core.model.loss import cross_entropy_sum
from core.model.rope import rotate

from . import tiny

PRECISIONS = ("fp32", "fp64", "bf16")
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "double()": lambda model: model.double(),
    "to(device, dtype)": lambda model: model.to("cpu", torch.bfloat16),
    "a layer's own to": lambda model: model.apply(lambda module: module.to(torch.bfloat16)),
    "there and back": lambda model: model.half().float(),
}


def build(precision: str, *overrides: str) -> LanguageModel:
    return tiny.build(f"precision.name={precision}", *overrides)


def saved_biases(model: LanguageModel) -> dict[str, Tensor]:
    """The biases, set to values that bf16 cannot hold."""
    for bias in tiny.biases(model).values():
        bias.copy_(torch.linspace(-0.777, 0.999, len(bias)))
    return {name: bias.clone() for name, bias in tiny.biases(model).items()}


@every_precision
@pytest.mark.parametrize("cast", CASTS)
def test_P1_the_bias_is_never_cast(precision: str, cast: str) -> None:
    """Same fp32 bits after any cast of the model, and it still moves by `rate` past 0.5."""
    model = build(precision)
    before = saved_biases(model)
    CASTS[cast](model)
    assert {bias.dtype for bias in tiny.biases(model).values()} == {torch.float32}
    tiny.assert_equal(tiny.biases(model), before)
    balancer = tiny.moe(model).balancers[0]
    balancer.on_step_end(tiny.totals(torch.arange(8)), tiny.START)
    moved = (balancer.bias - before["blocks.1.ffn.balance.0.bias"]).abs()
    torch.testing.assert_close(moved, torch.full((8,), 0.001), rtol=1e-4, atol=0)


@every_precision
def test_P1_loads_stay_int64_and_biases_fp32_through_a_step(precision: str) -> None:
    """Also for a model whose weights were cast."""
    for model in (build(precision), build(precision).to(torch.bfloat16)):
        seen = tiny.see(model, tiny.context())
        seen.total().backward()
        assert {load_E.dtype for load_E in seen.loads.values()} == {torch.int64}
        assert {bias.dtype for bias in tiny.biases(model).values()} == {torch.float32}
        assert all(term.count.dtype == torch.int64 for term in seen.terms.values())


@every_precision
def test_P1_the_bias_survives_saving_and_loading(precision: str) -> None:
    """Bit for bit, into a fresh model and into one that was cast before."""
    model = build(precision)
    before, file = saved_biases(model), io.BytesIO()
    torch.save(model.state_dict(), file)
    for other in (build(precision), build(precision).to(torch.bfloat16)):
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        tiny.assert_equal(tiny.biases(other), before)
    assert set(before) <= set(model.state_dict())


@every_precision
def test_P1_the_bias_survives_the_meta_device(precision: str) -> None:
    """meta, cast on meta, to_empty, reset, load."""
    recipe = tiny.compose(f"precision.name={precision}")
    model = core.build(recipe, device="meta").to(torch.bfloat16)
    assert {bias.dtype for bias in tiny.biases(model).values()} == {torch.float32}
    model = core.build(recipe, device="meta").to_empty(device="cpu")
    initialise(model, recipe.seed)
    assert all(
        bias.dtype == torch.float32 and not bias.any() for bias in tiny.biases(model).values()
    )
    assert all(bias.device.type == "cpu" for bias in tiny.biases(model).values())


def test_formats_of_weights_and_products() -> None:
    """bf16 keeps fp32 master weights; fp64 is fp64 throughout."""
    kept = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32}
    for precision, dtype in kept.items():
        assert {parameter.dtype for parameter in build(precision, *tiny.MTP).parameters()} == {
            dtype
        }


def test_the_process_default_format_changes_nothing() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = core.build(tiny.compose("precision.name=fp32"))
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def traced(model: LanguageModel, *, autocast: bool = False) -> dict[str, Any]:
    """The output of every module by name, and the losses."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found["losses"] = model(tiny.context())
    return found


def test_P14_under_bf16_the_router_and_the_losses_stay_in_fp32() -> None:
    found = traced(build("bf16", *tiny.MTP))
    assert found["blocks.0"][0].dtype == torch.bfloat16
    assert found["blocks.1.attention"].dtype == torch.bfloat16
    assert found["blocks.1.ffn.routed"].dtype == torch.bfloat16
    routing = found["blocks.1.ffn.router"]
    assert {t.dtype for t in (routing.logits_TE, routing.scores_TE, routing.gate_A)} == {
        torch.float32
    }
    assert {
        value.dtype for head in found["losses"].heads.values() for value in head.terms.values()
    } == {torch.float32}
    records = found["losses"].expert_records()
    assert len(records) == 4
    for record in records.values():
        assert record.sums[1]["share_NE"].dtype == torch.float32
        assert record.sums[1]["chosen_NE"].dtype == torch.int64


def test_P14_under_bf16_the_routers_product_is_fp32() -> None:
    """Bitwise the fp32 product of its bf16 input."""
    model = build("bf16")
    router, inputs = tiny.moe(model).router, []
    router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    routing = traced(model)["blocks.1.ffn.router"]
    assert inputs[0].dtype == torch.bfloat16
    assert torch.equal(routing.logits_TE, inputs[0].float() @ router.centroids.weight.T)


def test_P14_autocast_reaches_everything_but_router_norms_and_losses() -> None:
    """Lightning's mixed precisions are an autocast: the same rules hold there."""
    found = traced(build("fp32"), autocast=True)
    assert found["blocks.1.attention.kv_down"].dtype == torch.bfloat16
    assert found["blocks.1.ffn.router"].logits_TE.dtype == torch.float32
    assert found["losses"].heads["next_token"].terms["next_token"].dtype == torch.float32
    assert {record.load_E.dtype for record in found["losses"].expert_records().values()} == {
        torch.int64
    }


def test_bf16_losses_are_near_those_of_fp32() -> None:
    near = [tiny.see(build(p, *tiny.MTP), tiny.context(4, 16)).terms for p in ("bf16", "fp32")]
    for name, term in near[1].items():
        assert near[0][name].mean().item() == pytest.approx(term.mean().item(), rel=0.03), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_P45_norms_compute_in_fp32_or_wider(dtype: torch.dtype) -> None:
    """fp64 to the last bits; bf16 is one rounding away from the fp32 result."""
    norm = build("fp64").norm
    x_TD = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    y_TD = norm(x_TD)
    assert y_TD.dtype == dtype
    exact = torch.stack([rms_norm(x_D.double(), norm.weight, 1e-6) for x_D in x_TD]).detach()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y_TD.double(), exact, rtol=tolerance, atol=1e-15)


def test_P45_the_epsilon_is_inside_the_root() -> None:
    """x / sqrt(mean x^2 + eps) goes to x / sqrt(eps) for tiny inputs."""
    norm = build("fp64", "model.norm_eps=1e-4").norm
    x_D = torch.full((32,), 1e-6, dtype=torch.float64)
    torch.testing.assert_close(
        norm(x_D), x_D / (1e-12 + 1e-4) ** 0.5 * norm.weight, rtol=1e-12, atol=0
    )


def test_P45_rotations_keep_fp64_and_return_the_format_they_got() -> None:
    rope, positions = Rope(1e4, 4096), torch.arange(100, 105)
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = rotate(x, rope, positions[None])
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        narrow = rotate(x.to(dtype), rope, positions[None])
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.double(), wide, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(("batch", "length"), [(2, 6), (3, 400), (1, 512), (1, 513)])
def test_P45_the_loss_keeps_fp64_however_many_pieces_it_is_taken_in(
    batch: int, length: int
) -> None:
    """The sum of -log p over the counted positions, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    x_BLV = 5 * torch.randn(batch, length, 11, dtype=torch.float64, generator=generator)
    targets_BL = torch.randint(11, (batch, length), generator=generator)
    counted_BL = torch.rand(batch, length, generator=generator) < 0.7
    results = []
    for of in (cross_entropy_sum, _summed):
        leaf = x_BLV.clone().requires_grad_()
        total = of(lambda rows: 2 * rows, leaf, targets_BL, counted_BL)
        total.backward()
        results.append((total.detach(), leaf.grad))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)


def _summed(
    logits: Callable[[Tensor], Tensor], x_BLV: Tensor, targets_BL: Tensor, counted_BL: Tensor
) -> Tensor:
    log_p = logits(x_BLV).log_softmax(dim=-1).gather(2, targets_BL[..., None])[..., 0]
    return -(log_p * counted_BL).sum()
