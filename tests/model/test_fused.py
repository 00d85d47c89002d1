"""Functions with a backward of their own give the values and gradients of their formulas, written plainly."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from core.contracts.build import Rope
from core.contracts.router import Routing
from core.model.activation import swiglu, swiglu_product
from core.model.loss import IGNORED, cross_entropy_sum
from core.model.norm import RMSNorm
from core.model.rope import rope_table, rotate
from core.numerics.linear import Linear, plain_matrix
from core.routing.rows import gated_sums, sort_by_expert


def normal(*shape: int) -> Tensor:
    """Numbers in fp64 whose gradient is taken."""
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def assert_same(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """Both functions agree within 1e-12, in their values and in the gradients of a curved function of them."""
    torch.manual_seed(1)
    expected = plain(*inputs)
    found = fused(*inputs)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    size = max(1.0, float(expected.detach().abs().sum()))
    wanted = torch.autograd.grad(((expected / size).sin() * weight).sum(), inputs)
    gradients = torch.autograd.grad(((found / size).sin() * weight).sum(), inputs)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 8), (3, 0, 8), (2, 3, 1), (8,)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1], _build())
    x = normal(*shape)
    weight = normal(shape[-1])

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(norm, {"weight": weight}, (x,))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + norm.eps).sqrt() * weight

    assert_same(fused, plain, x, weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0, 1e15])
def test_rms_norm_of_one_row_without_gradients(dtype: torch.dtype, size: float) -> None:
    """What decoding computes token by token is what it computes for many rows at once."""
    norm = RMSNorm(48, _build())
    norm.weight.data.uniform_(0.5, 2)
    x = (torch.randn(3, 48, dtype=torch.float64) * size).to(dtype)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    with torch.no_grad():
        together = norm(x)
        for row, expected in zip(x, together, strict=True):
            torch.testing.assert_close(norm(row), expected, rtol=tolerance, atol=0)
            torch.testing.assert_close(
                norm(row[None, None]), expected[None, None], rtol=tolerance, atol=0
            )


def test_rms_norm_of_a_row_that_is_not_finite() -> None:
    norm = RMSNorm(4, _build())
    with torch.no_grad():
        assert norm(torch.tensor([1.0, torch.nan, 0, 0], dtype=torch.float64)).isnan().all()


def _build() -> Any:
    precision = SimpleNamespace(param_dtype=lambda role: torch.float64)
    return SimpleNamespace(norm_eps=1e-6, precision=precision)


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 2), (0, 4)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate / (1 + (-gate).exp()) * up

    assert_same(swiglu, plain, normal(*shape))


@pytest.mark.parametrize("shape", [(2, 5), (3,), (0,), ()])
def test_swiglu_and_the_product_after_it(shape: tuple[int, ...]) -> None:
    down = Linear(4, 3, std=1.0, param_dtype=torch.float64, compute_dtype=torch.float64)

    def fused(gate_up: Tensor, weight: Tensor) -> Tensor:
        return swiglu_product(gate_up, down)

    def plain(gate_up: Tensor, weight: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (gate * gate.sigmoid() * up) @ weight.t()

    assert_same(fused, plain, normal(*shape, 8), down.weight)


def test_a_layer_after_swiglu_that_is_no_plain_product_is_called() -> None:
    """A hook, another format, autocast, and any callable."""
    formats: Any = {"std": 1.0, "param_dtype": torch.float32, "compute_dtype": torch.float32}
    gate_up, seen = torch.randn(5, 8, requires_grad=True), []
    down = Linear(4, 3, **formats)
    expected = down(swiglu(gate_up))
    assert torch.equal(swiglu_product(gate_up, lambda x: 2 * down(x)), 2 * expected)
    hook = down.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(swiglu_product(gate_up, down), expected)
    assert seen == [1]
    hook.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert swiglu_product(gate_up, down).dtype == torch.bfloat16
    short = Linear(4, 3, **{**formats, "compute_dtype": torch.bfloat16})
    assert swiglu_product(gate_up, short).dtype == torch.bfloat16


@pytest.mark.parametrize("first", [0, 3, 4])
def test_rotation(first: int) -> None:
    """The rotated part begins at an even or an odd place of its row."""
    rope = Rope(1e4, 4096)
    positions_BL = torch.tensor([[0, 1, 7], [5, 6, 40]])
    cos, sin = (t[:, :, None] for t in rope_table(rope, 6, positions_BL, torch.float64))

    def plain(x: Tensor) -> Tensor:
        part = x[..., first : first + 6]
        even, odd = part[..., 0::2], part[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def fused(x: Tensor) -> Tensor:
        return rotate(x[..., first : first + 6], rope, positions_BL)

    assert_same(fused, plain, normal(2, 3, 2, 11))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_gated_sum_over_sorted_rows(tokens: int, dropped: bool) -> None:
    experts = 4
    expert_TK = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
    kept_TK = torch.rand(tokens, 2) < 0.6 if dropped else torch.ones(tokens, 2, dtype=torch.bool)
    matrices = torch.randn(experts, 3, 3, dtype=torch.float64)

    def fused(x_TD: Tensor, gate_TK: Tensor) -> Tensor:
        scores = torch.zeros(tokens, experts, dtype=torch.float64)
        routing = Routing.top_k(expert_TK, gate_TK, scores, scores)
        if dropped:
            routing = Routing(**{**vars(routing), "kept_A": kept_TK.flatten()})
        x_AD, ends_E, rows = sort_by_expert(x_TD, routing, experts)
        begins = [0, *ends_E.tolist()]
        y_AD = torch.zeros_like(x_AD)
        for e in range(experts):
            y_AD[begins[e] : begins[e + 1]] = x_AD[begins[e] : begins[e + 1]] @ matrices[e]
        return gated_sums(y_AD, rows)

    def plain(x_TD: Tensor, gate_TK: Tensor) -> Tensor:
        result = []
        for t in range(tokens):
            terms = [x_TD[t] * 0]
            for k in range(2):
                if kept_TK[t, k]:
                    terms.append(gate_TK[t, k] * (x_TD[t] @ matrices[expert_TK[t, k]]))
            result.append(torch.stack(terms).sum(dim=0))
        return torch.stack(result)

    assert_same(fused, plain, normal(tokens, 3), normal(tokens, 2))


@pytest.mark.parametrize("rows", [3, 512, 1100])
@pytest.mark.parametrize("counted", ["some", "none"])
def test_cross_entropy_from_hidden_states(rows: int, counted: str) -> None:
    output = Linear(4, 9, std=1.0, param_dtype=torch.float64, compute_dtype=torch.float64)
    targets = torch.randint(0, 9, (1, rows))
    counted_BL = torch.rand(1, rows) < (0.8 if counted == "some" else -1)
    hidden = normal(1, rows, 4)

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        assert plain_matrix(output) is not None
        return cross_entropy_sum(output, hidden, targets, counted_BL)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).flatten(0, 1)
        total = (hidden * 0).sum() + (weight * 0).sum()
        for t in counted_BL[0].nonzero()[:, 0].tolist():
            total = total - logits[t].log_softmax(dim=0)[targets[0, t]]
        return total

    assert_same(fused, plain, hidden, output.weight)
    assert IGNORED < 0


def test_a_layer_that_does_more_than_a_product_is_not_fused() -> None:
    """A derived class with its own forward, and a layer with a hook, are called."""

    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    formats: Any = {"std": 1.0, "param_dtype": torch.float64, "compute_dtype": torch.float64}
    doubled = Doubled(4, 9, **formats)
    hooked = Linear(4, 9, **formats)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    for layer in (doubled, hooked, nn.Identity(), lambda x: x):
        assert plain_matrix(layer) is None
    hidden, targets = normal(1, 5, 4), torch.randint(0, 9, (1, 5))
    for layer in (doubled, hooked):
        found = cross_entropy_sum(layer, hidden, targets, targets >= 0)
        logits = 2 * F.linear(hidden, layer.weight).flatten(0, 1)
        expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        torch.testing.assert_close(found, expected)


def test_whatever_a_call_does_beside_the_product_is_done() -> None:
    """A `forward` of one object, a hook before the backward, and autocast."""
    formats: Any = {"std": 1.0, "param_dtype": torch.float32, "compute_dtype": torch.float32}
    hidden, targets = torch.randn(1, 5, 4, requires_grad=True), torch.randint(0, 9, (1, 5))
    own = Linear(4, 9, **formats)
    own.forward = lambda x: 2 * F.linear(x, own.weight)  # type: ignore[method-assign]
    found = cross_entropy_sum(own, hidden, targets, targets >= 0)
    logits = 2 * F.linear(hidden, own.weight).flatten(0, 1)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets.flatten(), reduction="sum"))
    hooked, calls = Linear(4, 9, **formats), []
    hooked.register_full_backward_pre_hook(lambda module, gradients: calls.append(1))
    cross_entropy_sum(hooked, hidden, targets, targets >= 0).backward()
    assert calls == [1]
    plain = Linear(4, 9, **formats)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = cross_entropy_sum(plain, hidden, targets, targets >= 0)
        logits = F.linear(hidden, plain.weight).flatten(0, 1)
    expected = F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")
    torch.testing.assert_close(short, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    formats: Any = {"std": 1.0, "param_dtype": torch.float64, "compute_dtype": torch.float64}
    output, targets = Linear(4, 9, **formats), torch.randint(0, 9, (1, 600))
    hidden = normal(1, 600, 4)
    sides = {"hidden": hidden, "weight": output.weight}
    both = torch.autograd.grad(
        cross_entropy_sum(output, hidden, targets, targets >= 0), list(sides.values())
    )
    expected = dict(zip(sides, both, strict=True))
    sides[frozen].requires_grad_(False)
    cross_entropy_sum(output, hidden, targets, targets >= 0).backward()
    (open_side,) = sides.keys() - {frozen}
    assert sides[frozen].grad is None
    assert torch.equal(sides[open_side].grad, expected[open_side])  # type: ignore[arg-type]
