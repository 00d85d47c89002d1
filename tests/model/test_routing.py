"""DeepSeek-V3 routing, the layer around it, and the local dispatcher."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import Reference, choose
from saved_tensors import saved_bytes
from torch import Tensor

from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Router, Routing
from core.model.language_model import LanguageModel
from core.routing import gating
from plugins.deepseek_moe import training_on_cpu

from . import tiny

GROUPED = (
    f"{tiny.FFN}.experts=16",
    f"{tiny.ROUTER}.groups=4",
    f"{tiny.ROUTER}.group_limit=2",
    f"{tiny.ROUTER}.top_k=4",
)
FREE = (f"{tiny.ROUTER}.groups=1", f"{tiny.ROUTER}.group_limit=null")
CONTEXT = SequenceContext.of(torch.zeros(1, 1, dtype=torch.int64))


def tokens(count: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        count, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).to(dtype)


def router(*overrides: str) -> Router:
    """The first router of a model."""
    found = tiny.moe(tiny.build(*overrides)).router
    assert isinstance(found, Router)
    return found


def plus(bias_E: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda scores_TE: scores_TE + bias_E


def biases(count: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, dtype=torch.float64, generator=generator)
    return {
        "none": torch.zeros(count, dtype=torch.float64),
        "all -1": torch.full((count,), -1.0, dtype=torch.float64),
        "very negative": torch.full((count,), -1e4, dtype=torch.float64),
        "very positive": torch.full((count,), 1e4, dtype=torch.float64),
        "mixed": mixed,
        "one group far below": mixed - 50 * (torch.arange(count) < 4),
        "one expert far above": mixed + 50 * (torch.arange(count) == 9),
    }


@pytest.mark.parametrize("name", biases())
def test_A5_chosen_experts_lie_in_at_most_group_limit_groups(name: str) -> None:
    """P14: groups out of reach get -inf, so no negative bias brings one of their experts back."""
    expert_A = router(*GROUPED)(tokens(), plus(biases()[name]), CONTEXT).expert_A
    for chosen in expert_A.view(-1, 4).tolist():
        assert len(set(chosen)) == 4
        assert len({expert // 4 for expert in chosen}) <= 2


@pytest.mark.parametrize("name", biases())
def test_choices_equal_the_references(name: str) -> None:
    """Best groups by the sum of their best K / M biased affinities; then the best K in them."""
    settings = tiny.settings(tiny.compose(*GROUPED))
    routing = router(*GROUPED)(tokens(), plus(biases()[name]), CONTEXT)
    for chosen, scores in zip(
        routing.expert_A.view(-1, 4).tolist(), routing.scores_TE.tolist(), strict=True
    ):
        assert set(chosen) == set(choose(scores, biases()[name].tolist(), settings))


def test_a_group_is_as_strong_as_its_best_experts_together() -> None:
    """K / M = 2: .6 + .6 beats .9 + .1, although the best expert is in the other group."""
    scores_TE = torch.tensor([[0.9, 0.1, 0.0, 0.0, 0.6, 0.6, 0.0, 0.0]])
    chosen = router().select(scores_TE)
    assert set(chosen[0].tolist()) == {4, 5}


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_A6_gates_of_a_token_sum_to_the_scale(scale: float) -> None:
    routing = router(f"{tiny.ROUTER}.scale={scale}")(tokens(), plus(biases(8)["mixed"]), CONTEXT)
    torch.testing.assert_close(
        routing.gate_A.view(-1, 2).sum(dim=1), torch.full((40,), scale).double(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("constant", [-16.0, -1.0, 0.5, 64.0])
@pytest.mark.parametrize("overrides", [(), GROUPED])
def test_A7_a_constant_on_all_biases_changes_nothing(
    constant: float, overrides: tuple[str, ...]
) -> None:
    one = router(*overrides)
    bias_E = biases(one.experts)["mixed"]
    first, shifted = (one(tokens(), plus(b), CONTEXT) for b in (bias_E, bias_E + constant))
    assert torch.equal(
        first.expert_A.view(40, -1).sort(dim=1).values,
        shifted.expert_A.view(40, -1).sort(dim=1).values,
    )
    assert torch.equal(first.gate_A, shifted.gate_A)


def test_P14_gates_are_gathered_from_the_unbiased_affinities() -> None:
    one = router(*GROUPED)
    routing = one(tokens(), plus(biases()["mixed"]), CONTEXT)
    scores_TE = 1 / (1 + torch.exp(-(tokens() @ one.centroids.weight.T)))
    picked_TK = scores_TE.gather(1, routing.expert_A.view(-1, 4))
    expected_TK = 2.5 * picked_TK / picked_TK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.gate_A.view(-1, 4), expected_TK, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routing.scores_TE, scores_TE, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        routing.logits_TE, tokens() @ one.centroids.weight.T, rtol=1e-12, atol=1e-12
    )


def test_A10_no_gradient_reaches_the_bias() -> None:
    """Not even one that reads it; and it is a buffer, not a parameter."""
    model = tiny.build()
    bias = tiny.moe(model).balancers[0].bias
    bias.requires_grad_()
    tiny.see(model, tiny.context()).total().backward()
    assert bias.grad is None
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert len(tiny.biases(model)) == 2


def test_the_routing_is_a_token_major_list() -> None:
    routing = router()(tokens(3), plus(biases(8)["none"]), CONTEXT)
    assert routing.token_A.tolist() == [0, 0, 1, 1, 2, 2]
    assert routing.choice_A.tolist() == [0, 1, 0, 1, 0, 1]
    assert routing.choices == 2
    picked = routing.scores_TE.gather(1, routing.expert_A.view(3, 2))
    assert (picked[:, 0] >= picked[:, 1]).all()


def test_the_load_counts_valid_tokens_before_drops() -> None:
    """P6: in int64."""
    routing = tiny.routing(torch.tensor([[0, 1], [1, 2], [1, 7]]))
    dropped = replace(routing, kept_A=torch.tensor([True, False, False, True, True, False]))
    valid_T = torch.tensor([True, False, True])
    for one in (routing, dropped):
        assert one.load(valid_T).tolist() == [1, 2, 0, 0, 0, 0, 0, 1]
        assert one.load(valid_T).dtype == torch.int64
    assert int(routing.dropped(valid_T)) == 0
    assert int(dropped.dropped(valid_T)) == 2


def test_P14_autocast_leaves_the_router_alone() -> None:
    one, x_TD = router(*tiny.FP32), tokens(dtype=torch.float32)
    plain = one(x_TD, plus(torch.zeros(8)), CONTEXT)
    with torch.autocast("cpu", torch.bfloat16):
        cast = one(x_TD, plus(torch.zeros(8)), CONTEXT)
        narrow = one(x_TD.bfloat16(), plus(torch.zeros(8)), CONTEXT)
    for name in ("logits_TE", "scores_TE", "gate_A", "expert_A"):
        assert torch.equal(getattr(plain, name), getattr(cast, name)), name
    assert narrow.logits_TE.dtype == torch.float32
    assert torch.equal(narrow.logits_TE, x_TD.bfloat16().float() @ one.centroids.weight.T)


def test_P15_one_normalised_gate_is_refused() -> None:
    """The normalised gate of top_k = 1 is the constant `scale`: the router would get no gradient at all."""
    with pytest.raises(
        UserError, match=r"router\.top_k = 1: must be at least 2: one gate, normalised"
    ):
        tiny.compose(f"{tiny.ROUTER}.top_k=1")


# ---- the layer


def experts_of(model: LanguageModel, x_TD: Tensor, recipe: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's output for each token, and gradients of a weighted sum of it."""
    reference = Reference(model.state_dict(), tiny.settings(recipe))
    y_TD = torch.stack([reference.experts("blocks.1.ffn", x_D)[0] for x_D in x_TD])
    _score(y_TD).backward()
    prefix = "blocks.1.ffn."
    grads = {
        n.removeprefix(prefix): w.grad for n, w in reference.weights.items() if n.startswith(prefix)
    }
    return y_TD.detach(), {n: g for n, g in grads.items() if g is not None}


def _score(y_TD: Tensor) -> Tensor:
    return (y_TD * torch.linspace(1, 2, y_TD.numel(), dtype=torch.float64).view_as(y_TD)).sum()


BIASES = {
    "two experts get every token": torch.tensor([0.0, 0, 100, 0, 0, 100, 0, 0]),
    "one expert gets every token": torch.tensor([0.0, 0, 100, 0, 0, 0, 0, 0]),
    "one expert gets none": torch.tensor([0.0, 0, -100, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("name", BIASES)
def test_P16_extreme_loads(name: str, count: int) -> None:
    """Empty experts, one with all tokens, fewer tokens than experts, one token: forward and backward."""
    model, x_TD = tiny.build(*FREE), tokens(count)
    ffn = tiny.moe(model)
    ffn.balancers[0].bias.copy_(BIASES[name])
    y_BLD, record = ffn(x_TD[None], tiny.context(1, count))
    _score(y_BLD[0]).backward()
    expected, grads = experts_of(model, x_TD, tiny.compose(*FREE))
    torch.testing.assert_close(y_BLD[0], expected, rtol=1e-11, atol=1e-11)
    own = {n: g for n, g in tiny.gradients(ffn).items() if n in grads}
    tiny.assert_close(own, grads)
    assert int(record.load_E.sum()) == 2 * count
    high = (BIASES[name] > 1).nonzero()
    assert (record.load_E[high] == count).all()
    assert (record.load_E[BIASES[name] < -1] == 0).all()
    empty = record.load_E == 0
    assert not ffn.routed.gate_up.weight.grad[empty].any()
    assert ffn.routed.gate_up.weight.grad[~empty].flatten(1).any(dim=1).all()


def test_P16_no_token_at_all() -> None:
    """A rank may be left with none: an empty output, zero loads and finite zero gradients."""
    model = tiny.build()
    ffn, x_BLD = tiny.moe(model), torch.zeros(1, 0, 32, dtype=torch.float64, requires_grad=True)
    y_BLD, record = ffn(x_BLD, SequenceContext.of(torch.zeros(1, 0, dtype=torch.int64)))
    assert y_BLD.shape == (1, 0, 32)
    assert record.load_E.tolist() == [0] * 8
    y_BLD.sum().backward()
    assert not any(g.any() for g in tiny.gradients(ffn).values())


def test_A18_permuting_experts_with_their_centroids_and_biases_changes_nothing() -> None:
    model, x_BLD, given = tiny.build(*FREE), tokens()[None], tiny.context(1, 40)
    ffn = tiny.moe(model)
    before, record = ffn(x_BLD, given)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    _permute(ffn, order)
    after, permuted = ffn(x_BLD, given)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert torch.equal(permuted.load_E, record.load_E[order])
    assert len(set(record.load_E.tolist())) > 3


@pytest.mark.parametrize("order", [[3, 1, 0, 2, 4, 5, 6, 7], [4, 5, 6, 7, 0, 1, 2, 3]])
def test_A18_permuting_within_a_group_or_whole_groups_changes_nothing(order: list[int]) -> None:
    ffn, x_BLD, given = tiny.moe(tiny.build()), tokens()[None], tiny.context(1, 40)
    before = ffn(x_BLD, given)[0]
    _permute(ffn, torch.tensor(order))
    torch.testing.assert_close(ffn(x_BLD, given)[0], before, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def _permute(ffn: Any, order: Tensor) -> None:
    for tensor in (
        ffn.routed.gate_up.weight,
        ffn.routed.down.weight,
        ffn.router.centroids.weight,
        ffn.balancers[0].bias,
    ):
        tensor.copy_(tensor[order].clone())


# ---- the local dispatcher


def assigned(token_A: list[int], expert_A: list[int], kept_A: list[bool] | None = None) -> Routing:
    """Assignments in any order, as expert choice makes them."""
    count = len(token_A)
    gate_A = torch.linspace(0.5, 1.5, count, dtype=torch.float64).requires_grad_()
    scores_TE = torch.rand(max(token_A, default=0) + 1, 8, dtype=torch.float64)
    return Routing(
        token_A=torch.tensor(token_A, dtype=torch.int64),
        expert_A=torch.tensor(expert_A, dtype=torch.int64),
        gate_A=gate_A,
        choice_A=torch.zeros(count, dtype=torch.int64),
        scores_TE=scores_TE,
        logits_TE=scores_TE,
        kept_A=None if kept_A is None else torch.tensor(kept_A),
    )


def top_two(kept_A: list[bool] | None = None) -> Routing:
    expert_TK = torch.tensor([[3, 1], [1, 0], [7, 3], [1, 3], [0, 7]])
    gate_TK = torch.linspace(0.5, 1.5, 10, dtype=torch.float64).view(5, 2).requires_grad_()
    routing = tiny.routing(expert_TK, gate_TK)
    gate_A = routing.gate_A.detach().requires_grad_()
    return replace(routing, gate_A=gate_A, kept_A=None if kept_A is None else torch.tensor(kept_A))


SOME = [True, False, True, True, False, False, True, True, True, False]
ROUTINGS: dict[str, Callable[[], Routing]] = {
    "top-k": top_two,
    "top-k with drops": lambda: top_two(SOME),
    "top-k with everything dropped": lambda: top_two([False] * 10),
    "expert choice": lambda: assigned([4, 0, 2, 2, 4, 1, 4, 0], [0, 0, 3, 5, 5, 5, 7, 7]),
    "expert choice out of order, with drops": lambda: assigned(
        [4, 0, 2, 4, 0], [5, 0, 7, 2, 0], SOME[:5]
    ),
    "no assignment": lambda: assigned([], []),
}


def dispatched(ffn: Any, x_TD: Tensor, routing: Routing) -> Tensor:
    x_AD, ends_E, state = ffn.dispatcher.start(x_TD, routing).wait()
    assert ends_E.dtype == torch.int32
    result: Tensor = ffn.dispatcher.start_combine(ffn.routed(x_AD, ends_E), state).wait()
    return result


def called_directly(ffn: Any, x_TD: Tensor, routing: Routing) -> Tensor:
    """As training on a CPU does it where every token has the same number of choices."""
    if not routing.choices:
        return dispatched(ffn, x_TD, routing)
    result: Tensor = ffn.routed.of_routing(x_TD, routing)
    assert result is not None
    return result


def looped(ffn: Any, x_TD: Tensor, routing: Routing) -> Tensor:
    """One assignment at a time."""
    y_TD = torch.zeros_like(x_TD)
    for a, (token, expert) in enumerate(
        zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True)
    ):
        if routing.kept_A is None or routing.kept_A[a]:
            gate, up = (ffn.routed.gate_up.weight[expert] @ x_TD[token]).chunk(2)
            y_D = ffn.routed.down.weight[expert] @ (gate * gate.sigmoid() * up)
            y_TD = y_TD.index_add(0, torch.tensor([token]), (routing.gate_A[a] * y_D)[None])
    return y_TD


@pytest.mark.parametrize("name", ROUTINGS)
def test_local_dispatch_equals_a_loop_over_assignments(name: str) -> None:
    """Outputs, and gradients of tokens, gates and experts; a dropped assignment adds nothing to any."""
    ffn, x_TD, routing = tiny.moe(tiny.build()), tokens(5).requires_grad_(), ROUTINGS[name]()
    sources = (x_TD, routing.gate_A, ffn.routed.gate_up.weight, ffn.routed.down.weight)
    *found, expected = [of(ffn, x_TD, routing) for of in (dispatched, called_directly, looped)]
    wanted = _slopes(expected, sources)
    for result in found:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        for own, slope in zip(_slopes(result, sources), wanted, strict=True):
            torch.testing.assert_close(own, slope, rtol=1e-11, atol=1e-11)
        if routing.kept_A is not None:
            assert not _slopes(result, sources)[1][~routing.kept_A].any()


def _slopes(y_TD: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a score, 0 for whatever is not in the graph."""
    if y_TD.grad_fn is None:
        return [torch.zeros_like(source) for source in sources]
    found = torch.autograd.grad(_score(y_TD), sources, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(source) if slope is None else slope
        for source, slope in zip(sources, found, strict=True)
    ]


def test_training_on_a_cpu_calls_the_experts_directly_unless_they_do_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hook on the experts or on one of their products is called, and so is a product in another format."""
    calls = tiny.Calls(training_on_cpu.gated_experts)
    monkeypatch.setattr("plugins.deepseek_moe.training_on_cpu.gated_experts", calls)
    context, x_BLD = tiny.context(1, 6), tokens(6)[None]
    ffn = tiny.moe(tiny.build()).train()
    expected = ffn(x_BLD, context)[0]
    assert calls.count == 1
    seen: list[int] = []
    for part in (ffn.routed, ffn.routed.gate_up, ffn.routed.down):
        hook = part.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(ffn(x_BLD, context)[0], expected, rtol=1e-13, atol=1e-13)
        hook.remove()
    assert len(seen) == 3
    with torch.no_grad():
        torch.testing.assert_close(ffn(x_BLD, context)[0], expected, rtol=1e-13, atol=1e-13)
    emulated = tiny.moe(tiny.build("precision={name: bf16_emulated}")).train()
    emulated(x_BLD.float(), context)
    assert calls.count == 1


def test_frozen_experts_and_frozen_gates_get_no_gradient_and_the_others_the_same() -> None:
    ffn, x_TD, routing = tiny.moe(tiny.build()), tokens(5).requires_grad_(), top_two(SOME)
    sources = [x_TD, routing.gate_A, ffn.routed.gate_up.weight, ffn.routed.down.weight]
    expected = _slopes(ffn.routed.of_routing(x_TD, routing), sources)
    for frozen in sources:
        frozen.requires_grad_(False)
        free = [source for source in sources if source is not frozen]
        slopes = _slopes(ffn.routed.of_routing(x_TD, routing), free)
        frozen.requires_grad_(True)
        wanted = [
            slope for source, slope in zip(sources, expected, strict=True) if source is not frozen
        ]
        for own, slope in zip(slopes, wanted, strict=True):
            assert torch.equal(own, slope)


def test_training_on_a_cpu_keeps_neither_rows_nor_activations_nor_outputs() -> None:
    """The layer keeps for its backward the tokens, the first product, the gates and the order of rows."""
    ffn, x_TD = tiny.moe(tiny.build()), tokens(50).requires_grad_()
    expert_TK = torch.arange(100).view(50, 2) % 8
    routing = tiny.routing(expert_TK, torch.ones(50, 2, dtype=torch.float64))
    hidden = 100 * ffn.routed.gate_up.outputs * 8
    small = 100 * 8 * 3 + 8 * 8
    found = saved_bytes(lambda: ffn.routed.of_routing(x_TD, routing), ffn)
    assert found <= x_TD.untyped_storage().nbytes() + hidden + small


def test_rows_are_sorted_by_expert_and_keep_their_order() -> None:
    """Stable: the rows of one expert are in token order."""
    ffn, x_TD, routing = tiny.moe(tiny.build()), tokens(5), top_two()
    x_AD, ends_E, _ = ffn.dispatcher.start(x_TD, routing).wait()
    assert ends_E.tolist() == [2, 5, 5, 8, 8, 8, 8, 10]
    assert torch.equal(x_AD, x_TD[torch.tensor([1, 4, 0, 1, 3, 0, 2, 3, 2, 4])])


@pytest.mark.parametrize("choices", [2, 0])
def test_dropped_rows_go_past_the_last_experts_end(choices: int) -> None:
    """No expert multiplies them: the experts' ends hold kept rows only."""
    ffn, routing = tiny.moe(tiny.build()), replace(top_two(SOME), choices=choices)
    _, ends_E, _ = ffn.dispatcher.start(tokens(5), routing).wait()
    kept = [int(e) for e, keep in zip(routing.expert_A, SOME, strict=True) if keep]
    assert ends_E.tolist() == [sum(e <= expert for e in kept) for expert in range(8)]


def test_top_k_and_the_same_assignments_as_a_list_agree() -> None:
    ffn, x_TD, routing = tiny.moe(tiny.build()), tokens(5), top_two(SOME)
    as_list = replace(routing, choices=0)
    torch.testing.assert_close(
        dispatched(ffn, x_TD, as_list), dispatched(ffn, x_TD, routing), rtol=1e-13, atol=1e-13
    )


def test_costs_count_the_chosen_experts_only() -> None:
    ffn = tiny.moe(tiny.build())
    expert, shared, centroids = 3 * 12 * 32, 3 * 24 * 32, 8 * 32
    assert ffn.costs() == Costs(active=2 * expert + shared + centroids)


@pytest.mark.parametrize("size", [2, 3, 64])
def test_the_two_best_of_a_group_are_added_up(size: int) -> None:
    """Equal scores and biases of -inf included; the same bits as from sorting."""
    torch.manual_seed(0)
    scores_TGX = torch.randint(0, 4, (50, 3, size)).float() / 3
    scores_TGX[0, 0] = -torch.inf
    best = scores_TGX.sort(dim=2, descending=True).values[..., :2]
    found = gating._sum_of_best(scores_TGX, 2)
    assert torch.equal(found, best[..., 0] + best[..., 1])
