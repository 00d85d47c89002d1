"""Quantile Balancing as a balancer: integers, parts of a step, freezing, gradients, graphs and settings."""

import pytest
import torch
from tiers import first_by_default

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.schedule import Progress

from . import tiny
from .quantile_steps import FREE, drawn, end_step, histogram, quantile, recipe, routed, update

# ---- state


def test_biases_are_centred_and_a_common_shift_of_them_changes_no_update() -> None:
    """Only to a bin: many tokens need exactly the bias that there is, and rounding puts them on a side of a border."""
    plain, shifted = quantile(), quantile()
    shifted.bias.add_(0.5)
    for balancer in (plain, shifted):
        update(balancer, drawn(300, 8))
    assert abs(float(plain.bias.double().sum())) < 1e-6
    torch.testing.assert_close(shifted.bias, plain.bias, rtol=0, atol=2 * 2.0 / 1000)


def test_a_step_without_a_valid_token_leaves_the_bias() -> None:
    """Not even centred: there is nothing to learn from."""
    balancer = quantile()
    balancer.bias.copy_(torch.arange(8.0))
    given = tiny.context(2, 4, valid_BL=torch.zeros(2, 4, dtype=torch.bool))
    tallies = histogram(balancer, routed(balancer, drawn(8, 8)), given)
    assert not tallies["needed_EB"].any()
    end_step(balancer, tallies)
    assert torch.equal(balancer.bias, torch.arange(8.0))


def test_P2_tallies_of_parts_add_up_to_that_of_the_whole() -> None:
    balancer = quantile()
    balancer.bias.copy_(torch.linspace(-0.2, 0.2, 8))
    scores_TE = drawn(64, 8)
    whole = histogram(balancer, routed(balancer, scores_TE))["needed_EB"]
    parts = [
        histogram(balancer, routed(balancer, part))["needed_EB"]
        for part in scores_TE.split([1, 20, 43])
    ]
    assert whole.dtype == torch.int64
    assert whole.sum(dim=1).tolist() == [64] * 8
    assert torch.equal(torch.stack(parts).sum(dim=0), whole)


def test_P1_one_token_of_a_trillion_moves_the_bias_as_one_of_a_few() -> None:
    """Targets and counts are compared in integers: 2^40 tokens in each bin, and one more in the first."""
    small, large = quantile(2, 1, bins=4), quantile(2, 1, bins=4)
    even = torch.tensor([[0, 2, 2, 0], [0, 2, 2, 0]])
    one = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]])
    end_step(small, {"needed_EB": even})
    assert not small.bias.any()
    end_step(small, {"needed_EB": even + one})
    end_step(large, {"needed_EB": even * 2**40 + one})
    assert small.bias[0] < 0 < small.bias[1]
    assert large.bias[0] < 0 < large.bias[1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_P1_histograms_must_be_int64(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"^histograms are counted in int64, not "):
        end_step(quantile(bins=4), {"needed_EB": torch.ones(8, 4, dtype=dtype)})


def test_P7_a_frozen_one_stays_and_counts_nothing() -> None:
    balancer = quantile(frozen="true")
    balancer.bias.copy_(torch.linspace(-0.2, 0.2, 8))
    before = balancer.bias.clone()
    assert histogram(balancer, routed(balancer, drawn(20, 8))) == {}
    end_step(balancer, {})
    assert torch.equal(balancer.bias, before)


def test_the_kept_part_follows_its_schedule_and_all_of_it_is_no_update() -> None:
    balancer = quantile(
        ema="{start: 0.0, unit: steps, segments: [{until: 1}, {until: 9, to: 1.0}]}"
    )
    for step, moves in ((1, True), (2, False)):
        before = balancer.bias.clone()
        tallies = histogram(balancer, routed(balancer, drawn(50, 8, seed=step)))
        end_step(balancer, tallies, Progress(step, 50 * step, 10, 500))
        assert torch.equal(balancer.bias, before) != moves


def test_what_is_not_finite_is_counted_and_breaks_nothing() -> None:
    """A step with such affinities is skipped; its forward must not fail before."""
    balancer = quantile()
    for value in (float("nan"), float("inf"), -float("inf")):
        scores_TE = drawn(10, 8)
        scores_TE[3, 2] = value
        tallies = histogram(balancer, routed(balancer, scores_TE))
        assert tallies["needed_EB"].sum(dim=1).tolist() == [10] * 8


def test_A10_no_gradient_reaches_it() -> None:
    model = tiny.build(*recipe())
    bias = tiny.moe(model).balancers[0].bias
    bias.requires_grad_()
    tiny.see(model, tiny.context()).total().backward()
    assert bias.grad is None


@pytest.mark.parametrize("device", first_by_default(["meta", "cpu"]))
def test_the_tally_is_one_graph_and_its_shape_depends_on_no_data(device: str) -> None:
    balancer = quantile(bins=50).to(device)
    given = SequenceContext.of(torch.zeros(1, 40, dtype=torch.int64, device=device))
    compiled = torch.compile(balancer.tally, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        routing = routed(balancer, drawn(40, 8, seed=seed).to(device))
        tally = balancer.tally(routing, given)["needed_EB"]
        assert tally.shape == (8, 50)
        if device == "cpu":
            assert torch.equal(compiled(routing, given)["needed_EB"], tally)


# ---- settings


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("bins", "1", "must be between 2 and 65536"),
        ("bins", "65537", "must be between 2 and 65536"),
        ("span", "0", "must be more than 0 and at most 1,000,000"),
        ("span", "-1.0", "must be more than 0 and at most 1,000,000"),
        ("span", "1.0e+308", "must be more than 0 and at most 1,000,000"),
        ("span", ".inf", "must be finite"),
        ("span", ".nan", "must be finite"),
        ("ema", "-0.1", "must be between 0 and 1"),
        ("ema", "1.5", "must be between 0 and 1"),
        ("ema", ".nan", "must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"balance\.0\.{key} = .*: {why}"):
        tiny.compose(*recipe(**{key: value}))


def test_where_every_token_uses_every_expert_there_is_nothing_to_balance() -> None:
    with pytest.raises(UserError, match=r"every token uses all 8 experts \(top_k = 8\)"):
        tiny.compose(*recipe(), *FREE, f"{tiny.ROUTER}.top_k=8")
    tiny.compose(*recipe(), *FREE, f"{tiny.ROUTER}.top_k=7")


def test_a_router_without_a_bias_and_a_second_bias_are_refused() -> None:
    with pytest.raises(UserError, match="quantile needs a router that selects through"):
        tiny.compose(*recipe(), f"{tiny.ROUTER}={{name: hash}}")
    with pytest.raises(UserError, match="must be the only one that biases selection"):
        tiny.compose(f"{tiny.BALANCE}=[{{name: bias}}, {{name: quantile}}]")
