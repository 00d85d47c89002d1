"""Exact values of the bias controller (arXiv 2408.15664, algorithm 1) and the sequence-wise loss (report, 17-20)."""

from typing import Any

import pytest
import torch
from reference import Reference, bias_update, sequence_loss
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Routing
from core.contracts.schedule import Progress

from . import tiny

FOUR = (f"{tiny.FFN}.experts=4",)


def bias_of(*overrides: str) -> Any:
    """A bias controller over four experts, starting at 0."""
    balancer = tiny.moe(tiny.build(*FOUR, *overrides)).balancers[0]
    balancer.reset_parameters()
    return balancer


def sequence_of(experts: int = 8, top_k: int = 2) -> Any:
    """A sequence-wise loss for any number of experts and choices."""
    made = tiny.moe(tiny.build()).balancers[1]
    return type(made)(made.config, None, experts=experts, top_k=top_k)


def loss_of(balancer: Any, scores_TE: Tensor, context: SequenceContext | None = None) -> Tensor:
    """The summed loss; the routing's own choices are deliberately others than the top-k."""
    context = tiny.context(1, len(scores_TE)) if context is None else context
    wrong_TK = torch.zeros(len(scores_TE), balancer.top_k, dtype=torch.int64)
    routing = Routing.top_k(wrong_TK, scores_TE.gather(1, wrong_TK), scores_TE, scores_TE)
    result: Tensor = balancer.loss(balancer.observe(routing, context))
    return result


def scores(count: int = 12, experts: int = 8) -> Tensor:
    return torch.rand(
        count, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


# ---- the bias


@pytest.mark.parametrize(
    ("load", "directions"),
    [
        ((3, 1, 0, 4), (-1, 1, 1, -1)),
        ((2, 2, 2, 2), (0, 0, 0, 0)),
        ((3, 1, 2, 2), (-1, 1, 0, 0)),
        ((0, 0, 0, 0), (0, 0, 0, 0)),
        ((0, 0, 0, 1), (1, 1, 1, -1)),
        ((2**53 + 1, 2**53, 2**53, 2**53), (-1, 1, 1, 1)),
    ],
)
def test_A8_exact_bias_update(load: tuple[int, ...], directions: tuple[int, ...]) -> None:
    """Overloaded down, underloaded up, an exact tie with the mean stays; exact in integers (P1)."""
    balancer = bias_of()
    balancer.on_step_end(tiny.totals(load), tiny.START)
    assert torch.equal(balancer.bias, torch.tensor(directions) * torch.tensor(0.001))
    expected = bias_update([0.0] * 4, list(load), 0.001)
    torch.testing.assert_close(balancer.bias, torch.tensor(expected), rtol=1e-6, atol=0)


def test_P1_the_sign_is_right_where_fp32_sums_are_not() -> None:
    """60 more tokens than the mean of 40 million: fp32 counts see a tie, bf16 counts the wrong side."""
    balancer = bias_of()
    load_E = torch.tensor([40_000_001, 40_000_000, 40_000_000, 39_999_999])
    for _ in range(3):
        balancer.on_step_end(tiny.totals(load_E), tiny.START)
    step = torch.tensor(0.001)
    assert torch.equal(
        balancer.bias, torch.stack([-step - step - step, step * 0, step * 0, step + step + step])
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16, torch.float64])
def test_P1_loads_must_be_int64(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"^loads are counted in int64, not "):
        bias_of().on_step_end(tiny.totals(torch.tensor([3, 1, 0, 4]).to(dtype)), tiny.START)


def test_the_rate_follows_its_schedule() -> None:
    """DeepSeek-V3: 0.001, then 0 for the last part of the run."""
    segments = "[{shape: constant, until: 100}, {shape: constant, to: 0.0, until: 200}]"
    balancer = bias_of(
        f"{tiny.BALANCE}.0.rate={{start: 0.001, unit: tokens, segments: {segments}}}"
    )
    spread = []
    for tokens in (50, 100, 101, 200):
        balancer.on_step_end(tiny.totals([3, 1, 0, 4]), Progress(1, tokens, 10, 200))
        spread.append(float(balancer.metrics()["bias_spread"]))
    assert spread == pytest.approx([0.002, 0.004, 0.004, 0.004])


def test_P7_a_frozen_bias_stays() -> None:
    balancer = bias_of(f"{tiny.BALANCE}.0.frozen=true")
    balancer.on_step_end(tiny.totals([3, 1, 0, 4]), tiny.START)
    assert not balancer.bias.any()


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(UserError, match=r"balance\.0\.rate = -0\.1: must be at least 0"):
        tiny.compose(f"{tiny.BALANCE}.0.rate=-0.1")


def test_the_bias_is_added_to_the_scores_for_selection() -> None:
    balancer = bias_of()
    balancer.bias.copy_(torch.tensor([0.5, -0.25, 0, 8]))
    expected = torch.tensor([[1.5, 0.75, 1.0, 9.0]], dtype=torch.float64)
    assert torch.equal(balancer.adjust_scores(torch.ones(1, 4, dtype=torch.float64)), expected)
    assert balancer.selection_bias() is balancer.bias
    assert balancer.loss({}) is None
    assert balancer.count(tiny.context()) is None


def test_the_bias_brings_an_uneven_router_into_balance() -> None:
    """What the controller is for: hundreds of updates even out affinities that favour one expert."""
    model = tiny.build(
        *FOUR,
        f"{tiny.ROUTER}.groups=1",
        f"{tiny.ROUTER}.group_limit=null",
        f"{tiny.BALANCE}.0.rate=0.01",
    )
    ffn, context = tiny.moe(model), tiny.context(1, 200)
    ffn.balancers[0].reset_parameters()
    x_BLD = torch.randn(1, 200, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_BLD = x_BLD + 2 * ffn.router.centroids.weight.detach()[0]
    loads = []
    for _ in range(100):
        with torch.no_grad():
            loads.append(ffn(x_BLD, context)[1].load_E)
        ffn.balancers[0].on_step_end(tiny.totals(loads[-1]), tiny.START)
    assert loads[0].max() - loads[0].min() > 40
    assert loads[-1].max() - loads[-1].min() < 15


# ---- the sequence-wise loss


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (6, 3), (4, 1)])
def test_A9_uniform_load_gives_exactly_one(experts: int, top_k: int) -> None:
    """Scores turned by one expert per token: every expert is chosen equally often."""
    first = torch.linspace(0.1, 0.9, experts, dtype=torch.float64)
    scores_TE = torch.stack([first.roll(t) for t in range(2 * experts)])
    assert loss_of(sequence_of(experts, top_k), scores_TE).item() == pytest.approx(1.0, abs=1e-14)


def test_A9_uniform_choice_of_uneven_shares_is_one_too() -> None:
    """f_i = 1 for all i leaves the sum of P, which is 1."""
    generator = torch.Generator().manual_seed(0)
    scores_TE = 0.1 * torch.rand(8, 8, dtype=torch.float64, generator=generator)
    for t in range(8):
        scores_TE[t, [t, (t + 1) % 8]] += 0.5 + 0.05 * t
    assert loss_of(sequence_of(), scores_TE).item() == pytest.approx(1.0, abs=1e-14)


def test_P10_the_value_can_lie_below_uniform() -> None:
    """Two experts, six tokens at (.51, .49) and four at (.01, .99): 1.2 x .31 + .8 x .69 = 0.924."""
    scores_TE = torch.tensor([[0.51, 0.49]] * 6 + [[0.01, 0.99]] * 4, dtype=torch.float64)
    assert loss_of(sequence_of(2, 1), scores_TE).item() == pytest.approx(0.924, abs=1e-14)


def test_P10_where_shares_follow_choices_the_value_is_never_below_uniform() -> None:
    """P_i = f_i / E makes the loss the mean square of f, whose mean is 1."""
    generator = torch.Generator().manual_seed(0)
    balancer = sequence_of()
    for _ in range(200):
        chosen_E = torch.rand(8, dtype=torch.float64, generator=generator).pow(3)
        chosen_NE = (chosen_E / chosen_E.sum() * 12 * 2)[None]
        sums = {
            "chosen_NE": chosen_NE,
            "share_NE": chosen_NE / 2,
            "tokens_N": torch.tensor([12.0], dtype=torch.float64),
        }
        assert balancer.loss(sums) >= 1 - 1e-12


def test_all_tokens_to_the_same_experts_gives_at_most_experts_over_top_k() -> None:
    scores_TE = torch.full((5, 8), 1e-12, dtype=torch.float64)
    scores_TE[:, :2] = 0.9
    assert loss_of(sequence_of(), scores_TE).item() == pytest.approx(8 / 2, rel=1e-9)


def test_P10_scaling_all_scores_of_a_token_changes_nothing() -> None:
    """P is normalised per token, so pushing affinities to zero cannot buy a lower loss."""
    balancer, scores_TE = sequence_of(), scores()
    factors_T1 = torch.logspace(-6, 0, 12, dtype=torch.float64)[:, None]
    expected = loss_of(balancer, scores_TE)
    torch.testing.assert_close(
        loss_of(balancer, scores_TE * factors_T1), expected, rtol=1e-12, atol=0
    )


def test_P10_selection_is_unbiased_and_ungrouped() -> None:
    """Equal to the reference, whatever the routing chose and whatever the bias says."""
    balancer, scores_TE = sequence_of(), scores()
    assert loss_of(balancer, scores_TE).item() == pytest.approx(
        sequence_loss(list(scores_TE), 2).item(), rel=1e-12
    )


def test_P10_the_choice_of_a_biased_grouped_layer_leaves_the_loss_alone() -> None:
    """The layer's record holds the same sums under any bias."""
    model = tiny.build()
    ffn, x_BLD, context = (
        tiny.moe(model),
        torch.randn(2, 6, 32, dtype=torch.float64),
        tiny.context(2, 6),
    )
    first = ffn(x_BLD, context)[1]
    ffn.balancers[0].bias.copy_(10 * torch.arange(8.0).flip(0))
    second = ffn(x_BLD, context)[1]
    assert not torch.equal(first.load_E, second.load_E)
    tiny.assert_equal(second.sums[1], first.sums[1])


def test_f_carries_no_gradient() -> None:
    """d/ds_tj = (f_j / S_t - sum_i f_i s_ti / S_t^2) / T, with f constant."""
    scores_TE = scores().requires_grad_()
    loss_of(sequence_of(), scores_TE).backward()
    s_TE = scores_TE.detach()
    f_E = torch.zeros(8, dtype=torch.float64)
    for row in s_TE:
        f_E[row.topk(2).indices] += 8 / (2 * 12)
    total_T1 = s_TE.sum(dim=1, keepdim=True)
    expected = (f_E / total_T1 - (s_TE @ f_E)[:, None] / total_T1**2) / 12
    torch.testing.assert_close(scores_TE.grad, expected, rtol=1e-10, atol=1e-14)


def test_the_loss_is_formed_for_each_sequence_by_itself() -> None:
    """P12: two opposite sequences do not cancel."""
    balancer, scores_TE = sequence_of(), scores(24)
    parts = [loss_of(balancer, half).item() for half in scores_TE.split(12)]
    context = tiny.context(2, 12)
    assert loss_of(balancer, scores_TE, context).item() == pytest.approx(sum(parts), rel=1e-12)
    assert loss_of(balancer, scores_TE).item() != pytest.approx(sum(parts) / 2, rel=1e-3)


def test_documents_are_sequences_where_they_are_kept_apart() -> None:
    documents = torch.tensor([[0] * 5 + [1] * 8, [1] * 3 + [2] * 10])
    scores_TE, balancer = scores(24), sequence_of()
    expected = sum(sequence_loss(list(piece), 2).item() for piece in scores_TE.split([5, 7, 3, 9]))
    context = tiny.context(2, 12, documents_BM=documents)
    assert loss_of(balancer, scores_TE, context).item() == pytest.approx(expected, rel=1e-12)
    assert int(balancer.count(context)) == 4


@pytest.mark.parametrize(
    "documents", [None, torch.tensor([[0, 0, 0, 0, 1], [2, 2, 3, 4, 4], [5, 5, 5, 5, 5]])]
)
def test_P6_padding_counts_nowhere(documents: Tensor | None) -> None:
    """Its scores change nothing; a sequence of padding alone is not counted, and its gradient is 0."""
    valid_BL = torch.tensor([[True] * 4, [True, True, True, False], [False] * 4])
    context = tiny.context(3, 4, valid_BL=valid_BL, documents_BM=documents)
    scores_TE, balancer = scores(12).requires_grad_(), sequence_of()
    loss = loss_of(balancer, scores_TE, context)
    loss.backward()
    assert not scores_TE.grad[~valid_BL.flatten()].any()
    lengths = (4, 3) if documents is None else (4, 2, 1)
    kept = scores_TE.detach()[valid_BL.flatten()].split(lengths)
    assert loss.item() == pytest.approx(
        sum(sequence_loss(list(s), 2).item() for s in kept), rel=1e-12
    )
    assert int(balancer.count(context)) == len(lengths)


@pytest.mark.parametrize(
    "documents", [None, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [2] * 8 + [3]])]
)
@pytest.mark.parametrize("padded", [False, True])
def test_counts_are_known_from_the_data(documents: Tensor | None, padded: bool) -> None:
    """`count(context)` is the reference's count of every layer's loss, the multi-token modules' included."""
    valid_BL = torch.tensor([[True] * 8, [True] + [False] * 7]) if padded else None
    context = tiny.context(2, 8, valid_BL=valid_BL, documents_BM=documents)
    model = tiny.build(*tiny.MTP)
    expected = (
        Reference(model.state_dict(), tiny.settings(tiny.compose()))
        .run(tiny.lines(context))
        .balance
    )
    terms, inner = tiny.see(model, context).terms, model.contexts(context)
    assert list(model.expert_layers()) == list(expected)
    for path, ffn in model.expert_layers().items():
        count = ffn.balancers[1].count(inner.get(path, context))
        assert int(count) == int(terms[f"balance/{path}"].count) == expected[path][1], path


def test_alpha_is_the_coefficient_and_follows_its_schedule() -> None:
    alpha = "{start: 0.0, segments: [{shape: linear, to: 0.01, until: 1.0}]}"
    balancer = tiny.moe(tiny.build(f"{tiny.BALANCE}.1.alpha={alpha}")).balancers[1]
    assert balancer.coefficient(Progress(5, 50, 10, 100)) == pytest.approx(0.005)
    assert sequence_of().coefficient(tiny.START) == 0.0001
    assert sequence_of().scope == "sequence"
