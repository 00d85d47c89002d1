"""Quantile Balancing against a loop over its definition, and what an update can be proved to do to the load."""

import pytest
import torch
from routing_reference import needed_biases, quantile_histogram, quantile_step
from torch import Tensor

from core.contracts.router import GroupLimit
from core.routing.gating import shortfall

from . import tiny
from .quantile_steps import (
    LIMIT,
    LIMITS,
    drawn,
    end_step,
    histogram,
    max_vio,
    quantile,
    recipe,
    routed,
    update,
)

# ---- the definition


def test_a_case_by_hand() -> None:
    """Two experts, four bins of 0.5 from -1: quantiles -0.5 and 1/6, centred to -1/3 and 1/3.

    The tokens' second best affinities are .2, .4, .1, .3, so expert 0 needs -.7, -.4, -.6, 0 and expert 1 needs
    0, 0, 0, -.2. The even share is 2 of 4 tokens: the two of expert 0's first bin, and for expert 1 the one of its
    second bin and a third of the three in its third.
    """
    balancer = quantile(2, 1, bins=4)
    scores_TE = torch.tensor([[0.9, 0.2], [0.8, 0.4], [0.7, 0.1], [0.3, 0.5]], dtype=torch.float64)
    tallies = histogram(balancer, routed(balancer, scores_TE))
    assert tallies["needed_EB"].tolist() == [[2, 1, 1, 0], [0, 1, 3, 0]]
    end_step(balancer, tallies)
    torch.testing.assert_close(balancer.bias, torch.tensor([-1 / 3, 1 / 3]))


CASES = {
    "plain": {},
    "few bins": {"bins": 7},
    "many bins": {"bins": 4096},
    "a narrow span, so that many values are out of range": {"bins": 50, "span": 0.05},
    "a wide span": {"span": 3.0},
    "half of the old bias": {"ema": 0.5},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_it_equals_a_loop_over_its_definition(case: str, limits: str) -> None:
    """Counts are the same integers, biases the same to fp32, through the router, with padding and biases of a run."""
    keys = CASES[case]
    ffn = tiny.moe(tiny.build(*recipe(**keys), *LIMITS[limits]))
    (balancer,) = ffn.balancers
    valid_BL = torch.arange(12)[None] < torch.tensor([12, 5, 0])[:, None]
    given = tiny.context(3, 12, valid_BL=valid_BL)
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        x_TD = torch.randn(36, 32, dtype=torch.float64, generator=draw)
        bias = balancer.bias.double().tolist()
        routing = ffn.router(x_TD, ffn.adjust_scores, given)
        counted = routing.scores_TE[valid_BL.flatten()].tolist()
        needed = needed_biases(counted, bias, 2, **routing.limit._asdict())
        bins, span = keys.get("bins", 1000), keys.get("span", 1.0)
        expected = quantile_histogram(needed, bias, int(bins), span)
        tallies = histogram(balancer, routing, given)
        assert tallies["needed_EB"].tolist() == expected
        end_step(balancer, tallies)
        wanted = quantile_step(expected, bias, 2, span=span, ema=keys.get("ema", 0.0))
        torch.testing.assert_close(balancer.bias, torch.tensor(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limits", LIMITS)
def test_a_bias_exceeds_what_is_needed_just_where_a_token_selects_the_expert(limits: str) -> None:
    """So a bias that is the k/E quantile of its own needs gives every expert its share: updates end at an even load."""
    ffn = tiny.moe(tiny.build(*recipe(), *LIMITS[limits]))
    (balancer,) = ffn.balancers
    draw = torch.Generator().manual_seed(0)
    for spread in (0.0, 0.2, 1.0):
        balancer.bias.copy_(spread * torch.randn(8, generator=draw))
        x_TD = torch.randn(200, 32, dtype=torch.float64, generator=draw)
        routing = ffn.router(x_TD, ffn.adjust_scores, tiny.context(10, 20))
        biased_TE = balancer.adjust_scores(routing.scores_TE)
        above_TE = shortfall(biased_TE, 2, routing.limit) < 0
        selected_TE = torch.zeros_like(above_TE).scatter(1, routing.expert_A.view(-1, 2), True)
        assert torch.equal(above_TE, selected_TE)


@pytest.mark.parametrize("bins", [10, 1000])
def test_the_quantile_is_that_of_the_sorted_biases_to_a_bin(bins: int) -> None:
    """The smallest needed bias up to which k/E of the tokens lie, and the one found, are in the same bin."""
    balancer = quantile(8, 3, bins=bins)
    for seed in range(3):
        scores_TE = drawn(501, 8, seed=seed)
        bias = balancer.bias.double()
        width = float(bias.max() - bias.min() + 2) / bins
        cutoff_T1 = (scores_TE + bias).topk(4, dim=1).values[:, 3:]
        sorted_TE = (cutoff_T1 - scores_TE).sort(dim=0).values
        exact_E = sorted_TE[-(-501 * 3 // 8) - 1]
        update(balancer, scores_TE)
        shift_E = balancer.bias.double() - exact_E
        assert float(shift_E.max() - shift_E.min()) <= 2 * width + 1e-6


def test_no_affinity_of_a_sigmoid_or_softmax_is_out_of_range() -> None:
    """A cutoff is s + b of some expert, with s in [0, 1]: it is in [min b, max b + 1], and cutoff - s a unit wider."""
    balancer = quantile()
    draw = torch.Generator().manual_seed(0)
    for spread in (0.0, 0.1, 1.0, 30.0):
        balancer.bias.copy_(spread * torch.randn(8, generator=draw))
        bias = balancer.bias.double().tolist()
        extreme_TE = torch.randint(2, (200, 8), generator=draw).double()
        for scores_TE in (extreme_TE, drawn(200, 8), drawn(200, 8).softmax(dim=1)):
            needed = needed_biases(scores_TE.tolist(), bias, 2)
            assert min(bias) - 1 - 1e-12 <= min(map(min, needed))
            assert max(map(max, needed)) <= max(bias) + 1 + 1e-12


def test_P16_groups_may_leave_just_as_many_experts_as_a_token_uses() -> None:
    """No next best one is in reach then, and the group's score alone decides."""
    balancer = quantile(8, 4)
    limit = GroupLimit(4, 2, 2)
    scores_TE = drawn(400, 8, skew=1.5)
    found = [max_vio(update(balancer, scores_TE, limit), 8) for _ in range(12)]
    assert balancer.bias.isfinite().all()
    assert found[0] > 0.4
    assert found[-1] < 0.1


# ---- what one update does


def dual(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> float:
    """sum_t of the k best s + b, minus T k / E times the sum of b: its slopes in b are the loads minus the even one."""
    tokens, experts = scores_TE.shape
    best = (scores_TE + bias_E).topk(top_k, dim=1).values.sum()
    return float(best - tokens * top_k / experts * bias_E.sum())


@pytest.mark.parametrize("bins", [20, 1000])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 4), (4, 1), (6, 5)])
def test_an_update_raises_the_dual_by_no_more_than_its_bins_can(
    experts: int, top_k: int, bins: int
) -> None:
    """Update after update on one batch: the dual falls, up to a bound that is 0 for infinitely small bins.

    F(a, b) = sum_t (k a_t + sum_i max(s_ti + b_i - a_t, 0)) - T k / E sum_i b_i is never below the dual, and equals it
    where the a_t are the (k+1)-th best scores. For these a_t the exact quantiles minimise F over b. The estimate is in
    the same bin: at most a width away, and the slope on the way is at most the number of tokens in the bin.
    """
    balancer = quantile(experts, top_k, bins=bins)
    scores_TE = drawn(400, experts, skew=1.5)
    first = dual(scores_TE, balancer.bias.double(), top_k)
    for _ in range(6):
        before_E = balancer.bias.double()
        tallies = histogram(balancer, routed(balancer, scores_TE))
        width = float(before_E.max() - before_E.min() + 2) / bins
        inside = tallies["needed_EB"].amax(dim=1).sum()
        end_step(balancer, tallies)
        before = dual(scores_TE, before_E, top_k)
        after = dual(scores_TE, balancer.bias.double(), top_k)
        assert after <= before + width * float(inside) + 1e-3
    if bins == 1000:
        assert after < first - 1.0


@pytest.mark.parametrize("bins", [10, 100, 1000])
@pytest.mark.parametrize("limit", [None, LIMIT], ids=["one group", "groups"])
def test_as_many_tokens_need_less_than_the_new_bias_as_are_its_share_up_to_one_bin(
    limit: GroupLimit | None, bins: int
) -> None:
    """The tokens that need less than the quantile are T k / E, give or take those in the quantile's bin."""
    balancer = quantile(bins=bins)
    balancer.bias.copy_(torch.linspace(-0.2, 0.2, 8))
    for seed in range(3):
        scores_TE = drawn(333, 8, skew=1.5, seed=seed)
        histogram_EB = histogram(balancer, routed(balancer, scores_TE, limit))["needed_EB"]
        biased_TE = balancer.adjust_scores(scores_TE)
        needed_TE = balancer.bias + shortfall(biased_TE, 2, limit)
        solved_E = balancer._bins().quantile(histogram_EB, 2, 8)
        share = 333 * 2 / 8
        upto_EB = histogram_EB.cumsum(dim=1)
        for expert in range(8):
            less = int((needed_TE[:, expert] < solved_E[expert]).sum())
            place = int((upto_EB[expert] < share).sum())
            assert abs(less - share) <= int(histogram_EB[expert, place])
        end_step(balancer, {"needed_EB": histogram_EB})


@pytest.mark.parametrize("bins", [100, 1000, 10000])
def test_with_two_experts_one_update_balances_the_same_batch_up_to_two_bins(bins: int) -> None:
    """Expert 0 needs min(0, d) with d = s_1 - s_0, expert 1 min(-d, 0): the difference becomes the median of d.

    Both quantiles are right to a bin, so only tokens whose d is within two widths of the median may change sides.
    """
    for skew in (-1.0, 0.3, 2.0):
        balancer = quantile(2, 1, bins=bins)
        draw = torch.Generator().manual_seed(3)
        logits_TE = torch.randn(1000, 2, dtype=torch.float64, generator=draw)
        scores_TE = (logits_TE + torch.tensor([skew, 0.0])).sigmoid()
        uneven = update(balancer, scores_TE)
        even = routed(balancer, scores_TE)
        gap_T = scores_TE[:, 1] - scores_TE[:, 0]
        near = int(((gap_T - gap_T.median()).abs() <= 2 * 2.0 / bins + 1e-6).sum())
        load = int((even.expert_A == 0).sum())
        assert abs(load - 500) <= near
        assert max_vio(uneven, 2) > 0.1
        if bins >= 1000:
            assert abs(load - 500) <= 20


@pytest.mark.parametrize(
    ("experts", "top_k", "limit", "in_the_end"),
    [
        (8, 2, None, 0.05),
        (16, 4, None, 0.06),
        (16, 4, GroupLimit(4, 2, 2), 0.05),
        (64, 6, GroupLimit(8, 3, 2), 0.12),
    ],
)
def test_updates_on_one_batch_even_out_its_load(
    experts: int, top_k: int, limit: GroupLimit | None, in_the_end: float
) -> None:
    """From a MaxVio of 0.9 or more to half of it at once, and to nearly none within twenty updates."""
    balancer = quantile(experts, top_k)
    scores_TE = drawn(2000, experts, skew=1.5)
    found = [max_vio(update(balancer, scores_TE, limit), experts) for _ in range(21)]
    assert found[0] > 0.9
    assert found[1] < found[0] / 2
    assert found[-1] < in_the_end


@pytest.mark.parametrize("span", [0.1, 1.0, 4.0])
def test_affinities_without_an_upper_bound_are_balanced_too(span: float) -> None:
    """sqrt(softplus), up to 3 here: biases out of range wait in the end bins, which the next step's range passes."""
    balancer = quantile(span=span)
    logits_TE = drawn(1000, 8, skew=1.5).logit()
    scores_TE = torch.nn.functional.softplus(2 * logits_TE).sqrt()
    found = [max_vio(update(balancer, scores_TE), 8) for _ in range(30)]
    assert found[0] > 1.5
    assert found[-1] < 0.06
