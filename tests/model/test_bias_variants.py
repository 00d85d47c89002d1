"""The selection bias's variants (arXiv 2408.15664, tables 3 and 4): exact values, state and number formats."""

from copy import deepcopy
from fractions import Fraction
from typing import Any

import pytest
import torch
from routing_reference import bias_step, deepseek_v3
from torch import Tensor

from core.contracts.errors import UserError
from core.contracts.router import Routing

from . import tiny
from .test_routers import found, inputs, logits_of, router

RATE = 0.001
LOADS = {
    "uneven": (3, 1, 0, 4),
    "even": (2, 2, 2, 2),
    "a tie with the mean": (3, 1, 2, 2),
    "one takes all": (0, 0, 0, 8),
    "nothing": (0, 0, 0, 0),
    "a mean that is no integer": (1, 0, 0, 0),
    "beyond fp32": (40_000_001, 40_000_000, 40_000_000, 39_999_999),
    "beyond fp64": (2**53 + 1, 2**53, 2**53, 2**53),
}
UPDATES = [("sign", "relative"), ("proportional", "relative"), ("proportional", "fraction")]


def recipe(**keys: Any) -> tuple[str, ...]:
    written = ", ".join(
        f"{key}: {value}" for key, value in {"name": "bias", "rate": RATE, **keys}.items()
    )
    return (f"{tiny.FFN}.experts=4", f"{tiny.BALANCE}=[{{{written}}}]")


def bias_of(**keys: Any) -> Any:
    """A controller over four experts as it is at first."""
    balancer = tiny.moe(tiny.build(*recipe(**keys))).balancers[0]
    balancer.reset_parameters()
    return balancer


def flag(value: bool) -> str:
    return str(value).lower()


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("form", ["additive", "multiplicative"])
@pytest.mark.parametrize(("update", "unit"), UPDATES)
@pytest.mark.parametrize("load", LOADS)
def test_A8_exact_values_of_every_variant(
    load: str, update: str, unit: str, form: str, centre: bool
) -> None:
    """Biases follow from int64 loads; the difference to the mean is formed before anything is rounded (P1)."""
    one = bias_of(update=update, unit=unit, form=form, centre=flag(centre))
    start = 1.0 if form == "multiplicative" else 0.0
    one.on_step_end(tiny.totals(LOADS[load]), tiny.START)
    expected = bias_step(
        [start] * 4, list(LOADS[load]), RATE, update=update, unit=unit, centre=centre
    )
    torch.testing.assert_close(one.bias, torch.tensor(expected), rtol=2e-7, atol=1e-18)
    assert torch.isfinite(one.bias).all()


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(("update", "unit"), UPDATES)
def test_updates_add_up_over_steps(update: str, unit: str, centre: bool) -> None:
    one, expected = bias_of(update=update, unit=unit, centre=flag(centre)), [0.0] * 4
    for load in ((3, 1, 0, 4), (0, 0, 0, 0), (7, 0, 0, 1), (2, 2, 2, 2)):
        one.on_step_end(tiny.totals(load), tiny.START)
        expected = bias_step(expected, list(load), RATE, update=update, unit=unit, centre=centre)
    torch.testing.assert_close(one.bias, torch.tensor(expected), rtol=1e-6, atol=1e-10)
    assert one.bias.any()


def test_the_two_units_differ_by_the_number_of_experts() -> None:
    """(mean - c) / mean = E (mean - c) / sum c: 1, not 4 times the count."""
    moved = {}
    for unit in ("relative", "fraction"):
        one = bias_of(update="proportional", unit=unit)
        one.on_step_end(tiny.totals([3, 1, 0, 4]), tiny.START)
        moved[unit] = one.bias
    torch.testing.assert_close(moved["relative"], RATE * torch.tensor([-0.5, 0.5, 1.0, -1.0]))
    torch.testing.assert_close(moved["fraction"], RATE * torch.tensor([-0.125, 0.125, 0.25, -0.25]))


def test_the_proportional_update_does_not_depend_on_the_batchs_size() -> None:
    one, larger = (bias_of(update="proportional") for _ in range(2))
    one.on_step_end(tiny.totals([3, 1, 0, 4]), tiny.START)
    larger.on_step_end(tiny.totals(torch.tensor([3, 1, 0, 4]) * 10**9), tiny.START)
    assert torch.equal(one.bias, larger.bias)


def test_sign_moves_centred_keep_the_mean() -> None:
    """One overloaded, three underloaded: plain moves drift by half a step, centred ones do not."""
    plain, centred = bias_of(), bias_of(centre="true")
    for one in (plain, centred):
        one.on_step_end(tiny.totals([0, 0, 0, 8]), tiny.START)
    torch.testing.assert_close(plain.bias.mean(), torch.tensor(RATE / 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        centred.bias, RATE * torch.tensor([0.5, 0.5, 0.5, -1.5]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("form", "expected"),
    [("additive", [2.5, 1.75, 3.0, 10.0]), ("multiplicative", [1.0, -0.5, 2.0, 16.0])],
)
def test_the_form_decides_how_it_enters_the_selection(form: str, expected: list[float]) -> None:
    one = bias_of(form=form)
    one.bias.copy_(torch.tensor([0.5, -0.25, 1.0, 8.0]))
    assert one.adjust_scores(torch.full((1, 4), 2.0, dtype=torch.float64)).tolist() == [expected]


@pytest.mark.parametrize(("form", "start"), [("additive", 0.0), ("multiplicative", 1.0)])
def test_it_starts_without_a_say(form: str, start: float) -> None:
    """Scores times 1, or plus 0: the selection is the unbiased one."""
    one = bias_of(form=form)
    assert one.bias.tolist() == [start] * 4
    scores_TE = torch.rand(3, 4, dtype=torch.float64)
    assert torch.equal(one.adjust_scores(scores_TE), scores_TE)


def test_gates_stay_unbiased_under_a_multiplicative_bias() -> None:
    """It changes who is chosen, and no gate of one who was chosen before."""
    free = (f"{tiny.ROUTER}.groups=1", f"{tiny.ROUTER}.group_limit=null")
    ffn = tiny.moe(tiny.build(*recipe(form="multiplicative"), *free))
    x_TD, context = torch.randn(12, 32, dtype=torch.float64), tiny.context(1, 12)
    ffn.balancers[0].bias.copy_(torch.tensor([1.0, 3.0, 0.1, 0.5]))
    routing: Routing = ffn.router(x_TD, ffn.balancers[0].adjust_scores, context)
    scores_TE = torch.sigmoid(x_TD @ ffn.router.centroids.weight.T)
    chosen_TK = (scores_TE * torch.tensor([1.0, 3.0, 0.1, 0.5])).topk(2).indices
    assert torch.equal(routing.expert_A.view(-1, 2), chosen_TK)
    assert not torch.equal(chosen_TK, scores_TE.topk(2).indices)
    picked_TK = scores_TE.gather(1, chosen_TK)
    expected_TK = 2.5 * picked_TK / picked_TK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.gate_A.view(-1, 2), expected_TK, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 5.0])
def test_P14_a_softmax_router_selects_through_any_bias_and_gates_without_it(
    name: str, shift: float
) -> None:
    """Biased experts within biased groups, masked by -inf: where all are negative, 0 would bring far groups back."""
    bias_E = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + shift
    own = (
        {"affinity": "softmax", "normalise": False, "group_score": 1}
        if name == "deepseek_v3"
        else {}
    )
    keys = {"top_k": 3, "groups": 4, "group_limit": 2, "scale": 2.0}
    logits_TE, context = logits_of("random", 18), tiny.context(2, 9)
    routing = router(name, **keys, **own)(
        inputs(logits_TE), lambda scores_TE: scores_TE + bias_E, context
    )
    chosen = {"affinity": "softmax", "normalise": False, "group_score": 1}
    wanted = deepseek_v3(list(logits_TE), bias_E.tolist(), **keys, **chosen)
    actual = {place: gate for place, (_, gate) in found(routing, [True] * 18).items()}
    assert actual == pytest.approx(
        {(a.token, a.expert): a.gate.item() for a in wanted}, rel=1e-10, abs=0
    )


VARIANTS = [{}, {"update": "proportional"}, {"form": "multiplicative"}, {"centre": "true"}]


@pytest.mark.parametrize("keys", VARIANTS)
def test_A10_no_gradient_reaches_it(keys: dict[str, str]) -> None:
    model = tiny.build(*recipe(**keys))
    bias = tiny.moe(model).balancers[0].bias
    bias.requires_grad_()
    tiny.see(model, tiny.context()).total().backward()
    assert bias.grad is None


@pytest.mark.parametrize("keys", VARIANTS)
def test_P1_state_round_trips_and_stays_fp32(keys: dict[str, str]) -> None:
    """State dict and casts of the model keep the format and the values."""
    one = bias_of(**keys)
    for load in ((3, 1, 0, 4), (5, 1, 1, 1)):
        one.on_step_end(tiny.totals(load), tiny.START)
    other = bias_of(**keys)
    assert not torch.equal(other.bias, one.bias)
    other.load_state_dict(deepcopy(one.state_dict()))
    assert torch.equal(other.bias, one.bias)
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        other.to(dtype)
        assert other.bias.dtype == torch.float32
        assert torch.equal(other.bias, one.bias)


@pytest.mark.parametrize("keys", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
def test_P1_loads_must_be_int64(dtype: torch.dtype, keys: dict[str, str]) -> None:
    with pytest.raises(TypeError, match=r"^loads are counted in int64, not "):
        bias_of(**keys).on_step_end(tiny.totals(torch.tensor([3, 1, 0, 4]).to(dtype)), tiny.START)


@pytest.mark.parametrize("keys", VARIANTS)
def test_P7_a_frozen_one_stays(keys: dict[str, str]) -> None:
    one = bias_of(**keys, frozen="true")
    before = one.bias.clone()
    one.on_step_end(tiny.totals([3, 1, 0, 4]), tiny.START)
    assert torch.equal(one.bias, before)


@pytest.mark.parametrize("keys", VARIANTS)
def test_a_rate_of_zero_stays(keys: dict[str, str]) -> None:
    one = bias_of(**{**keys, "rate": 0.0})
    before = one.bias.clone()
    one.on_step_end(tiny.totals([3, 1, 0, 4]), tiny.START)
    assert torch.equal(one.bias, before)


@pytest.mark.parametrize(
    ("key", "value"), [("update", "square"), ("unit", "tokens"), ("form", "power")]
)
def test_unknown_variants_are_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"balance.0.{key}"):
        tiny.compose(*recipe(**{key: value}))


@pytest.mark.parametrize("keys", VARIANTS)
def test_every_variant_brings_an_uneven_router_into_balance(keys: dict[str, str]) -> None:
    """Scores that favour one expert: after many updates the four loads differ little."""
    one = bias_of(**{**keys, "rate": 0.02})
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(400, 4, dtype=torch.float64, generator=generator) * 0.6 + torch.tensor(
        [0.3, 0, 0, 0.05]
    )
    loads = [load_of(one, scores_TE)]
    for _ in range(200):
        one.on_step_end(tiny.totals(loads[-1]), tiny.START)
        loads.append(load_of(one, scores_TE))
    mean = Fraction(int(loads[0].sum()), 4)
    assert loads[0].max() > 1.5 * float(mean)
    assert loads[-1].max() < 1.15 * float(mean)


def load_of(one: Any, scores_TE: Tensor) -> Tensor:
    """How many tokens choose each expert."""
    return one.adjust_scores(scores_TE).topk(2).indices.flatten().bincount(minlength=4)
