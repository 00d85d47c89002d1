"""A limit on SwiGLU: values and gradients of every path are those of one number at a time, at the limit too."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Routing
from core.model import few_tokens
from core.model.activation import gate_and_up, swiglu, swiglu_product
from core.numerics.linear import Linear
from plugins.deepseek_moe import chosen

from . import tiny

LIMIT = 0.75
LIMITED = (
    f"{tiny.FFN}.swiglu_limit={LIMIT}",
    f"model.blocks.dense.ffn.swiglu_limit={LIMIT}",
    "model.init.std=0.6",
)
"""Weights that are large enough for a good part of both halves to be clamped."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scalar_swiglu(gate: float, up: float, limit: float) -> tuple[float, float, float]:
    """The product and its derivatives; a factor beyond the limit counts as the limit, and has no slope."""
    clamped_gate = min(gate, limit)
    clamped_up = max(-limit, min(up, limit))
    sigmoid = 1 / (1 + math.exp(-clamped_gate))
    silu = clamped_gate * sigmoid
    slope = sigmoid * (1 + clamped_gate * (1 - sigmoid))
    by_gate = slope * clamped_up if gate <= limit else 0.0
    by_up = silu if abs(up) <= limit else 0.0
    return silu * clamped_up, by_gate, by_up


EDGES = [-9.0, -LIMIT, math.nextafter(LIMIT, 0), LIMIT, math.nextafter(LIMIT, 9), 0.0, -0.3, 9.0]


def pairs() -> Tensor:
    """Every gate beside every up, at the limit, next to it and far from it: N x 2."""
    return torch.tensor([[gate, up] for gate in EDGES for up in EDGES], dtype=torch.float64)


def plain(gate_up: Tensor) -> Tensor:
    """The formula with torch's own operations, as a compiler gets it."""
    gate, up = gate_and_up(gate_up, LIMIT)
    return nn.functional.silu(gate) * up


def through_a_product(gate_up: Tensor) -> Tensor:
    """The activation together with a product that changes nothing."""
    down = Linear(1, 1, std=1.0, param_dtype=torch.float64, compute_dtype=torch.float64)
    down.weight.data.fill_(1)
    return swiglu_product(gate_up, down, LIMIT)


PATHS: dict[str, Callable[[Tensor], Tensor]] = {
    "own backward": lambda gate_up: swiglu(gate_up, LIMIT),
    "autograd": plain,
    "with the product after it": through_a_product,
}


@pytest.mark.parametrize("path", PATHS)
def test_values_and_slopes_are_those_of_single_numbers(path: str) -> None:
    gate_up = pairs().requires_grad_()
    value = PATHS[path](gate_up)
    value.sum().backward()
    expected = [scalar_swiglu(gate, up, LIMIT) for gate, up in gate_up.tolist()]
    assert value.flatten().tolist() == pytest.approx([e[0] for e in expected], rel=1e-14)
    assert gate_up.grad is not None
    assert gate_up.grad.flatten().tolist() == pytest.approx(
        [slope for e in expected for slope in e[1:]], rel=1e-14
    )
    with torch.no_grad():
        assert torch.equal(PATHS[path](gate_up), value)


def test_the_gradient_is_that_of_differences() -> None:
    gate_up = random(5, 8).requires_grad_()
    assert (gate_up.detach().abs() - LIMIT).abs().min() > 1e-3
    weight = random(3, 4, seed=1)
    down = Linear(4, 3, std=1.0, param_dtype=torch.float64, compute_dtype=torch.float64)
    down.weight.data.copy_(weight)
    assert gradcheck(lambda x: swiglu(x, LIMIT), (gate_up,))
    assert gradcheck(lambda x: swiglu_product(x, down, LIMIT), (gate_up,))


def test_a_nan_is_not_clamped_away() -> None:
    gate_up = torch.tensor([[math.nan, 1.0], [1.0, math.nan]], requires_grad=True)
    assert swiglu(gate_up, LIMIT).isnan().all()


def test_a_limit_that_nothing_reaches_changes_no_bit() -> None:
    gate_up = random(7, 8)
    for limit in (None, 100.0):
        leaf = gate_up.clone().requires_grad_()
        swiglu(leaf, limit).sin().sum().backward()
        if limit is None:
            expected = leaf.grad
        else:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected)  # type: ignore[arg-type]


# ---- experts, in every way that they are called


def looped(ffn: Any, x_TD: Tensor, routing: Routing) -> Tensor:
    """One assignment after the other, clamped by minimum and maximum."""
    y_TD = torch.zeros_like(x_TD)
    rows = zip(routing.token_A.tolist(), routing.expert_A.tolist(), routing.gate_A, strict=True)
    for token, expert, weight in rows:
        product = ffn.routed.gate_up.weight[expert] @ x_TD[token]
        gate, up = product.chunk(2)
        bound = torch.full_like(gate, LIMIT)
        gate = torch.where(gate > LIMIT, bound, gate)
        up = torch.where(up > LIMIT, bound, torch.where(up < -LIMIT, -bound, up))
        y_D = ffn.routed.down.weight[expert] @ (gate * gate.sigmoid() * up)
        y_TD = y_TD.index_add(0, torch.tensor([token]), (weight * y_D)[None])
    return y_TD


def clamped_share(ffn: Any, x_TD: Tensor) -> tuple[float, float]:
    """How much of the gates and of the ups of all experts is beyond the limit."""
    gate_TEI, up_TEI = torch.einsum("td,exd->tex", x_TD, ffn.routed.gate_up.weight).chunk(2, dim=2)
    beyond = (gate_TEI > LIMIT, up_TEI.abs() > LIMIT)
    return float(beyond[0].double().mean()), float(beyond[1].double().mean())


def sorted_rows(ffn: Any, x_TD: Tensor, routing: Routing) -> Tensor:
    """As the dispatcher does it, on GPUs and between ranks."""
    x_AD, ends_E, state = ffn.dispatcher.start(x_TD, routing).wait()
    result: Tensor = ffn.dispatcher.start_combine(ffn.routed(x_AD, ends_E), state).wait()
    return result


def on_a_cpu(ffn: Any, x_TD: Tensor, routing: Routing) -> Tensor:
    """As training on a CPU does it."""
    result: Tensor = ffn.routed.of_routing(x_TD, routing)
    return result


@pytest.mark.parametrize("path", [sorted_rows, on_a_cpu])
def test_experts_equal_a_loop_over_assignments(path: Callable[..., Tensor]) -> None:
    """Outputs, and gradients of tokens, gates and both matrices."""
    ffn = tiny.moe(tiny.build(*LIMITED))
    x_TD = random(6, 32).requires_grad_()
    assert min(clamped_share(ffn, x_TD.detach())) > 0.1
    expert_TK = torch.tensor([[0, 3], [3, 7], [1, 0], [2, 3], [7, 6], [3, 5]])
    scores_TE = torch.zeros(6, 8, dtype=torch.float64)
    routing = Routing.top_k(expert_TK, random(6, 2, seed=2).requires_grad_(), scores_TE, scores_TE)
    sources = (x_TD, routing.gate_A, ffn.routed.gate_up.weight, ffn.routed.down.weight)
    weight_TD = random(6, 32, seed=3)
    expected = looped(ffn, x_TD, routing)
    wanted = torch.autograd.grad((expected.sin() * weight_TD).sum(), sources, retain_graph=True)
    found = path(ffn, x_TD, routing)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    slopes = torch.autograd.grad((found.sin() * weight_TD).sum(), sources)
    for own, slope in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(own, slope, rtol=1e-10, atol=1e-10)


def test_the_function_of_training_on_a_cpu_has_the_gradient_of_differences() -> None:
    ffn = tiny.moe(tiny.build(*LIMITED))
    expert_TK, scores_TE = torch.tensor([[0, 3], [3, 1]]), torch.zeros(2, 8, dtype=torch.float64)

    def output(x_TD: Tensor, gate_TK: Tensor) -> Tensor:
        routing = Routing.top_k(expert_TK, gate_TK, scores_TE, scores_TE)
        return on_a_cpu(ffn, x_TD, routing)

    inputs = (random(2, 32).requires_grad_(), random(2, 2, seed=1).requires_grad_())
    assert gradcheck(output, inputs)


@pytest.mark.parametrize("function", [few_tokens.gated_experts, chosen.gated_experts])
def test_few_tokens_of_decoding_are_clamped(function: Callable[..., Tensor]) -> None:
    ffn = tiny.moe(tiny.build(*LIMITED))
    x_TD, gate_TK = random(3, 32), random(3, 2, seed=1)
    expert_TK, scores_TE = torch.tensor([[3, 0], [1, 2], [2, 3]]), torch.zeros(3, 8).double()
    matrices = (ffn.routed.gate_up.weight, ffn.routed.down.weight)
    with torch.no_grad():
        expected = looped(ffn, x_TD, Routing.top_k(expert_TK, gate_TK, scores_TE, scores_TE))
        found = function(x_TD, *matrices, expert_TK, gate_TK, LIMIT)
        unlimited = function(x_TD, *matrices, expert_TK, gate_TK)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (unlimited - expected).abs().max() > 0.1


def test_decoding_has_the_logits_of_the_full_forward() -> None:
    """Dense, shared and routed layers; the same model without limits has others."""
    model = tiny.build(*LIMITED).eval()
    tokens_BL = tiny.context(2, 9).tokens_BL
    caches = model.new_caches(2, 9)
    with torch.no_grad():
        full_BLV = model.logits(tokens_BL)
        parts = [model.decode(part, caches) for part in tokens_BL.split([5, 1, 1, 2], dim=1)]
        for module in model.modules():
            if hasattr(module, "limit"):
                module.limit = None
        free_BLV = model.logits(tokens_BL)
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BLV, rtol=1e-10, atol=1e-10)
    assert (free_BLV - full_BLV).abs().max() > 0.1


@pytest.mark.parametrize("layer", ["dense", "shared"])
def test_dense_and_shared_layers_are_clamped(layer: str) -> None:
    model = tiny.build(*LIMITED)
    part: Any = model.get_submodule("blocks.0.ffn")
    x_BLD = random(1, 5, 32).requires_grad_()
    if layer == "dense":
        found = part(x_BLD, SequenceContext.of(torch.zeros(1, 5, dtype=torch.int64)))[0]
    else:
        part = tiny.moe(model).shared
        found = part(x_BLD[0])[None]
    gate_up = nn.functional.linear(x_BLD, part.gate_up.weight)
    assert (gate_up.abs() > LIMIT).any()
    expected = nn.functional.linear(plain(gate_up), part.down.weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slopes = [
        torch.autograd.grad(y.sin().sum(), x_BLD, retain_graph=True)[0] for y in (found, expected)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("precision", ["fp8_emulated", "bf16_emulated"])
def test_emulated_formats_round_what_is_clamped(precision: str) -> None:
    """The layer equals its parts: the product, the clamped activation, and the product after it."""
    ffn = tiny.moe(tiny.build(*LIMITED, f"precision={{name: {precision}}}"))
    x_TD = random(6, 32).to(ffn.shared.down.weight.dtype)
    with torch.no_grad():
        gate_up = ffn.shared.gate_up(x_TD)
        assert (gate_up.abs() > LIMIT).any()
        expected = ffn.shared.down(plain(gate_up))
        torch.testing.assert_close(ffn.shared(x_TD), expected, rtol=0, atol=0)
        ends_E = torch.tensor([1, 1, 2, 4, 4, 4, 6, 6], dtype=torch.int32)
        hidden = plain(ffn.routed.gate_up(x_TD, ends_E))
        expected = ffn.routed.down(hidden, ends_E)
        torch.testing.assert_close(ffn.routed(x_TD, ends_E), expected, rtol=0, atol=0)


def test_recomputation_changes_no_bit_of_a_clamped_model() -> None:
    found = []
    for more in ((), ("recompute.blocks=[dense, moe]",)):
        model = tiny.build(*LIMITED, *more).train()
        tiny.see(model, tiny.context()).total().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.full
def test_a_compiled_layer_is_clamped() -> None:
    ffn = tiny.moe(tiny.build(*LIMITED, "precision.name=fp32")).train()
    context, x_BLD = tiny.context(1, 6), random(1, 6, 32).float()
    expected = ffn(x_BLD, context)[0]
    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_BLD, context)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", [f"{tiny.FFN}.swiglu_limit", "model.blocks.dense.ffn.swiglu_limit"])
def test_a_limit_that_is_none_is_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{key} = .*must be (more than 0, or null|finite)"):
        tiny.compose(f"{key}={value}")


def test_a_whole_number_is_a_limit() -> None:
    assert (
        tiny.compose(f"{tiny.FFN}.swiglu_limit=10").model.blocks["moe"].ffn.config.swiglu_limit
        == 10
    )
