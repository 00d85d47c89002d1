"""Every balancing loss: its value at uniform load and at collapse, the reference's gradient, what it is formed over."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import routing_reference as reference
import torch
from routing_reference import Rows
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Routing
from core.contracts.schedule import Progress

from . import tiny

EXPERTS, TOP_K, DEVICES, LIMIT = 8, 2, 4, 2
ROUTER = f"{tiny.ROUTER}={{name: deepseek_v2, top_k: 2, groups: {DEVICES}, group_limit: {LIMIT}, scale: 1.0}}"
Chosen = list[list[int]]


@dataclass(frozen=True)
class Loss:
    """A balancer's settings, the reference for one piece, and its values at uniform load and at collapse.

    `collapse` is for all tokens at experts 0 and 1 with a share of one half each, the first ahead by a hair.
    """

    name: str
    over: str
    piece: Callable[[Rows, Chosen], Tensor]
    uniform: float
    collapse: float
    keys: dict[str, Any] = field(default_factory=dict)


def _share(rows: Rows, _: Chosen) -> Tensor:
    return reference.share_loss(rows, TOP_K)


def _gshard(rows: Rows, _: Chosen) -> Tensor:
    return reference.gshard_loss(rows)


def _switch(rows: Rows, _: Chosen) -> Tensor:
    return reference.switch_loss(rows)


def _expert(rows: Rows, chosen: Chosen) -> Tensor:
    return reference.expert_loss(rows, chosen, TOP_K)


def _device(rows: Rows, chosen: Chosen) -> Tensor:
    return reference.device_loss(rows, chosen, TOP_K, DEVICES)


def _communication(rows: Rows, chosen: Chosen) -> Tensor:
    return reference.communication_loss(rows, chosen, DEVICES, LIMIT)


PLACES = {"devices": DEVICES}
LOSSES = {
    "sequence": Loss("sequence", "sequence", _share, 1, EXPERTS / TOP_K),
    "batch": Loss("batch", "batch", _share, 1, EXPERTS / TOP_K),
    "micro_batch": Loss("micro_batch", "micro_batch", _share, 1, EXPERTS / TOP_K),
    **{
        f"gshard over {over}": Loss(
            "gshard", over, _gshard, 1 / EXPERTS**2, 1 / (2 * EXPERTS), {"alpha": 0.1, "over": over}
        )
        for over in ("sequence", "batch", "micro_batch")
    },
    **{
        f"switch over {over}": Loss("switch", over, _switch, 1, EXPERTS / 2, {"over": over})
        for over in ("sequence", "batch", "micro_batch")
    },
    "expert": Loss("expert", "sequence", _expert, 1, EXPERTS / TOP_K),
    "device": Loss("device", "sequence", _device, 1, DEVICES, PLACES),
    "communication": Loss(
        "communication",
        "sequence",
        _communication,
        1,
        DEVICES / LIMIT,
        {**PLACES, "device_limit": LIMIT},
    ),
}
BY_SEQUENCE = [name for name, loss in LOSSES.items() if loss.over == "sequence"]
POOLED = [name for name, loss in LOSSES.items() if loss.over != "sequence"]
FOLLOWING = ["expert", "device", "communication"]  # f from what the routing chose


def balancer(name: str, **keys: Any) -> Any:
    """The balancer of a recipe, by itself."""
    made = tiny.compose(*recipe(name, **keys)).model.blocks["moe"].ffn.config.balance[0]
    return made.component(made.config, None, experts=EXPERTS, top_k=TOP_K)


def recipe(name: str, **keys: Any) -> tuple[str, ...]:
    written = ", ".join(f"{key}: {value}" for key, value in {"name": name, **keys}.items())
    return (ROUTER, f"{tiny.BALANCE}=[{{{written}}}]")


def of(name: str) -> Any:
    return balancer(LOSSES[name].name, **LOSSES[name].keys)


def scores(tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(
        tokens, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def choices(tokens: int = 12, seed: int = 0) -> Tensor:
    """Two experts a token that are not the best two."""
    generator = torch.Generator().manual_seed(seed + 7)
    return torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]


def term(one: Any, scores_TE: Tensor, expert_TK: Tensor, context: SequenceContext) -> tiny.Term:
    return tiny.Term(
        formed(one, one.observe(tiny.routing(expert_TK, scores_TE=scores_TE), context)),
        one.count(context),
    )


def formed(one: Any, sums: dict[str, Tensor]) -> Tensor:
    """The loss of some sums, as a sum itself."""
    result = one.loss(sums)
    assert isinstance(result, Tensor)
    assert result.shape == ()
    return result


def expected(
    name: str, scores_TE: Tensor, expert_TK: Tensor, context: SequenceContext
) -> tuple[Tensor, int]:
    """The reference's sum over pieces and their number."""
    loss = LOSSES[name]
    pieces = reference.groups_of(
        context.valid().tolist(), "sequence" if loss.over == "sequence" else "batch"
    )
    values = [
        loss.piece([scores_TE[t] for t in piece], expert_TK[piece].tolist()) for piece in pieces
    ]
    return torch.stack(values).sum() if values else (scores_TE * 0).sum(), len(values)


def turned() -> tuple[Tensor, Tensor]:
    """Uniform load: scores turned by one expert per token, each choosing its own best two."""
    first = torch.tensor([0.9, 0.05, 0.1, 0.2, 0.8, 0.15, 0.3, 0.25], dtype=torch.float64)
    scores_TE = torch.stack([first.roll(t) for t in range(2 * EXPERTS)])
    return scores_TE, scores_TE.topk(TOP_K).indices


@pytest.mark.parametrize("name", LOSSES)
def test_P11_the_value_at_uniform_load(name: str) -> None:
    """Every token reaches two devices: its best two experts are four apart."""
    scores_TE, expert_TK = turned()
    value = term(of(name), scores_TE, expert_TK, tiny.context(1, 16)).mean()
    assert value.item() == pytest.approx(LOSSES[name].uniform, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_P11_the_value_at_total_collapse(name: str) -> None:
    scores_TE = torch.full((16, EXPERTS), 1e-14, dtype=torch.float64)
    scores_TE[:, 0], scores_TE[:, 1] = 0.5 + 1e-14, 0.5
    expert_TK = torch.tensor([[0, 1]] * 16)
    value = term(of(name), scores_TE, expert_TK, tiny.context(2, 8)).mean()
    assert value.item() == pytest.approx(LOSSES[name].collapse, rel=1e-11)


@pytest.mark.parametrize("shape", [(1, 12), (3, 4), (4, 3), (12, 1)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_references(name: str, shape: tuple[int, int]) -> None:
    """The gradient with respect to every score; f is a plain number in the reference, so it has none here."""
    own, other = scores().requires_grad_(), scores().requires_grad_()
    context, expert_TK = tiny.context(*shape), choices()
    actual, (value, count) = (
        term(of(name), own, expert_TK, context),
        expected(name, other, expert_TK, context),
    )
    assert actual.sum.item() == pytest.approx(value.item(), rel=1e-12)
    assert int(actual.count) == count
    actual.sum.backward()
    value.backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_P10_at_uniform_load_there_is_no_gradient(name: str) -> None:
    """Shares that sum to 1 cannot lower the loss where f is equal for all: a gradient would come through f."""
    scores_TE, expert_TK = turned()
    scores_TE.requires_grad_()
    term(of(name), scores_TE, expert_TK, tiny.context(1, 16)).sum.backward()
    torch.testing.assert_close(scores_TE.grad, torch.zeros_like(scores_TE), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_P10_scaling_all_scores_of_a_token_changes_nothing(name: str) -> None:
    factors_T1 = torch.logspace(-6, 0, 12, dtype=torch.float64)[:, None]
    context, one = tiny.context(2, 6), of(name)
    plain, scaled = (
        term(one, s, choices(), context).sum for s in (scores(), scores() * factors_T1)
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_P6_padding_counts_nowhere(name: str) -> None:
    """Its scores and choices change nothing and get no gradient; a sequence of padding alone is no piece."""
    valid_BL = torch.tensor([[True] * 4, [False, True, True, False], [False] * 4])
    context, valid_T = tiny.context(3, 4, valid_BL=valid_BL), valid_BL.flatten()
    own = scores().requires_grad_()
    actual = term(of(name), own, choices(), context)
    value, count = expected(name, own.detach(), choices(), context)
    assert actual.sum.item() == pytest.approx(value.item(), rel=1e-12)
    assert int(actual.count) == count
    actual.sum.backward()
    assert not own.grad[~valid_T].any()
    assert own.grad[valid_T].any()
    other = torch.where(valid_T[:, None], choices(), choices(seed=1))
    wild = torch.where(valid_T[:, None], scores(), scores(seed=1))
    assert torch.equal(term(of(name), wild, other, context).sum, actual.sum)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch", [(2, 4), (1, 0)])
def test_P6_nothing_valid_is_a_loss_of_zero(name: str, batch: tuple[int, int]) -> None:
    """Its gradient too, without NaN."""
    valid_BL = torch.zeros(batch, dtype=torch.bool)
    own = scores(valid_BL.numel()).requires_grad_()
    value = term(
        of(name), own, choices(valid_BL.numel()), tiny.context(*batch, valid_BL=valid_BL)
    ).mean()
    value.backward()
    assert value.item() == 0
    assert not own.grad.any()


def opposite() -> tuple[Tensor, Tensor, SequenceContext]:
    """Two sequences that each collapse, and are uniform together: one takes the first half of the experts."""
    scores_TE = torch.full((16, EXPERTS), 1e-12, dtype=torch.float64)
    for t in range(16):
        start = 4 * (t // 8)
        scores_TE[t, [start + t % 4, start + (t + 1) % 4]] = torch.tensor(
            [0.6, 0.4], dtype=torch.float64
        )
    return scores_TE, scores_TE.topk(TOP_K).indices, tiny.context(2, 8)


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_P12_sequences_are_not_pooled(name: str) -> None:
    """Two opposite collapses do not cancel: each of them is twice the uniform value."""
    actual = term(of(name), *opposite())
    assert int(actual.count) == 2
    assert actual.mean().item() > 1.4 * LOSSES[name].uniform


@pytest.mark.parametrize("name", POOLED)
def test_a_loss_over_a_batch_pools_its_sequences(name: str) -> None:
    actual = term(of(name), *opposite())
    assert actual.mean().item() == pytest.approx(LOSSES[name].uniform, rel=1e-9)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.over == "batch"])
def test_P9_sums_over_micro_batches_make_the_batchs_loss(name: str) -> None:
    """One piece of 5 sequences, seen as 2 and 3: the sums add up to the same loss."""
    one, scores_TE, expert_TK = of(name), scores(20), choices(20)
    valid_BL = torch.ones(5, 4, dtype=torch.bool)
    valid_BL[1, 2:] = False
    context = tiny.context(5, 4, valid_BL=valid_BL)
    whole = term(one, scores_TE, expert_TK, context).mean()
    parts = []
    for rows, tokens in ((slice(0, 2), slice(0, 8)), (slice(2, 5), slice(8, 20))):
        routing = tiny.routing(expert_TK[tokens], scores_TE=scores_TE[tokens])
        parts.append(one.observe(routing, tiny.part(context, rows)))
    together = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    assert int(one.count(context)) == 1
    torch.testing.assert_close(formed(one, together), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_documents_are_sequences_where_they_are_kept_apart(name: str) -> None:
    documents_BM = torch.tensor([[0] * 5 + [1] * 8])
    context, scores_TE, expert_TK = (
        tiny.context(1, 12, documents_BM=documents_BM),
        scores(),
        choices(),
    )
    loss = LOSSES[name]
    pieces = [range(5), range(5, 12)]
    value = sum(
        loss.piece([scores_TE[t] for t in p], [expert_TK[t].tolist() for t in p]).item()
        for p in pieces
    )
    actual = term(of(name), scores_TE, expert_TK, context)
    assert actual.sum.item() == pytest.approx(value, rel=1e-12)
    assert int(actual.count) == 2


@pytest.mark.parametrize("name", LOSSES)
def test_what_f_counts(name: str) -> None:
    """V2's losses count what the routing chose, dropped or not; the others do not look at it."""
    one, context = of(name), tiny.context(1, 12)
    routing = tiny.routing(choices(), scores_TE=scores())
    dropped = replace(routing, kept_A=torch.arange(24) % 3 == 0)
    values = [formed(one, one.observe(r, context)) for r in (routing, dropped)]
    assert torch.equal(*values)
    other = term(one, scores(), choices(seed=1), context).sum
    assert torch.equal(other, values[0]) == (name not in FOLLOWING)


def test_communication_counts_a_token_once_for_each_device() -> None:
    """Both experts of every token on device 0 of 4, at most 2 devices: f is 4 / 2 there, and P is one quarter."""
    scores_TE = torch.full((6, EXPERTS), 0.125, dtype=torch.float64)
    expert_TK = torch.tensor([[0, 1], [1, 0]] * 3)
    assert term(
        of("communication"), scores_TE, expert_TK, tiny.context(1, 6)
    ).sum.item() == pytest.approx(0.5)
    apart_TK = torch.tensor([[0, 2], [0, 3]] * 3)
    assert term(
        of("communication"), scores_TE, apart_TK, tiny.context(1, 6)
    ).sum.item() == pytest.approx(1.0)


# ---- the z-loss


def z_term(logits_TE: Tensor, context: SequenceContext) -> tiny.Term:
    one = balancer("z_loss")
    routing = replace(
        tiny.routing(choices(len(logits_TE)), scores_TE=scores(len(logits_TE))), logits_TE=logits_TE
    )
    return tiny.Term(formed(one, one.observe(routing, context)), one.count(context))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_z_loss_is_the_references(scale: float) -> None:
    """The loss of each valid token and its gradient are right, also where exp alone would overflow."""
    valid_BL = torch.tensor([[True] * 4, [False, True, True, False], [False] * 4])
    logits_TE, context = scale * (scores() - 0.3), tiny.context(3, 4, valid_BL=valid_BL)
    own, other = logits_TE.clone().requires_grad_(), logits_TE.clone().requires_grad_()
    actual, value = (
        z_term(own, context),
        reference.z_loss([other[t] for t in range(12) if valid_BL.flatten()[t]]),
    )
    assert actual.sum.item() == pytest.approx(value.item(), rel=1e-12)
    assert int(actual.count) == 6
    actual.sum.backward()
    value.backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-13)


def test_the_z_loss_at_equal_logits() -> None:
    """(log E)^2 at 0; logits of -log E cost nothing."""
    logits_TE = torch.zeros(6, EXPERTS, dtype=torch.float64)
    log = torch.tensor(float(EXPERTS), dtype=torch.float64).log()
    torch.testing.assert_close(
        z_term(logits_TE, tiny.context(2, 3)).mean(), log**2, rtol=1e-12, atol=0
    )
    assert z_term(logits_TE - log, tiny.context(2, 3)).mean().item() == pytest.approx(
        0.0, abs=1e-28
    )


# ---- coefficients and scopes


@pytest.mark.parametrize(
    ("name", "alpha", "scope", "keys"),
    [
        ("sequence", 0.0001, "sequence", {}),
        ("batch", 0.001, "batch", {}),
        ("micro_batch", 0.001, "micro_batch", {}),
        ("gshard", 0.25, "sequence", {"alpha": 0.25}),
        ("gshard", 0.25, "batch", {"alpha": 0.25, "over": "batch"}),
        ("switch", 0.01, "micro_batch", {}),
        ("switch", 0.01, "sequence", {"over": "sequence"}),
        ("switch", 0.01, "batch", {"over": "batch"}),
        ("expert", 0.003, "sequence", {}),
        ("device", 0.05, "sequence", PLACES),
        ("communication", 0.02, "sequence", {**PLACES, "device_limit": 2}),
        ("z_loss", 0.001, "token", {}),
    ],
)
def test_P11_each_loss_has_its_papers_coefficient(
    name: str, alpha: float, scope: str, keys: dict[str, Any]
) -> None:
    """No coefficient is taken over from another formula; all of them can follow a schedule."""
    one = balancer(name, **keys)
    assert one.coefficient(tiny.START) == alpha
    assert one.scope == scope
    schedule = "{start: 0.0, segments: [{shape: linear, to: 0.01, until: 1.0}]}"
    moving = balancer(name, **{**keys, "alpha": schedule})
    assert moving.coefficient(Progress(5, 50, 10, 100)) == pytest.approx(0.005)


def test_P11_gshards_coefficient_has_no_default() -> None:
    """Its paper does not print it."""
    with pytest.raises(UserError, match=r"balance\.0\.alpha: required key is missing"):
        tiny.compose(*recipe("gshard"))


@pytest.mark.parametrize("name", [*LOSSES, "z_loss"])
def test_no_loss_adjusts_the_selection_or_keeps_state(name: str) -> None:
    one = of(name) if name in LOSSES else balancer(name)
    assert torch.equal(one.adjust_scores(scores()), scores())
    one.on_step_end(tiny.totals(torch.arange(8)), tiny.START)
    assert not one.state_dict()
    assert one.selection_bias() is None


def test_P8_every_loss_of_a_layer_is_a_term_of_its_own() -> None:
    """All of them at once in a model: the record's sums line up with the layer's balancers."""
    balance = (
        "[{name: expert}, {name: device, devices: 4}, {name: communication, devices: 4, device_limit: 2}, "
        + ("{name: z_loss}, {name: switch}, {name: gshard, alpha: 0.1}, {name: batch}]")
    )
    model, context = tiny.build(ROUTER, f"{tiny.BALANCE}={balance}"), tiny.context(2, 8)
    losses = model(context)
    for path, record in losses.expert_records().items():
        pairs = zip(tiny.moe(model, path).balancers, record.sums, strict=True)
        values = [tiny.Term(formed(b, sums), b.count(context)).mean() for b, sums in pairs]
        assert len(values) == 7
        assert all(torch.isfinite(value) and value > 0 for value in values)
        slopes = [
            torch.autograd.grad(v, tiny.moe(model, path).router.centroids.weight, retain_graph=True)
            for v in values
        ]
        assert all(slope[0].any() for slope in slopes)


def test_a_routing_made_by_hand_agrees_with_the_layers() -> None:
    """The layer hands its balancers the router's own routing, in the order of its tokens."""
    model, context = tiny.build(*recipe("expert")), tiny.context(2, 8)
    ffn, x_BLD = tiny.moe(model), torch.randn(2, 8, 32, dtype=torch.float64)
    _, record = ffn(x_BLD, context)
    routing: Routing = ffn.router(x_BLD.flatten(0, 1), lambda scores_TE: scores_TE, context)
    value, _ = expected("expert", routing.scores_TE, routing.expert_A.view(-1, TOP_K), context)
    torch.testing.assert_close(formed(ffn.balancers[0], record.sums[0]), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("groups", "reach", "limit", "allowed"), [(4, 2, 2, True), (4, 2, 3, False), (1, 1, 3, True)]
)
def test_the_device_limit_is_the_routers_where_it_has_devices(
    groups: int, reach: int, limit: int, allowed: bool
) -> None:
    router = f"{{name: deepseek_v2, top_k: 4, groups: {groups}, group_limit: {reach}}}"
    balance = f"[{{name: communication, devices: 4, device_limit: {limit}}}]"
    overrides = (f"{tiny.ROUTER}={router}", f"{tiny.FFN}.balance={balance}")
    if allowed:
        tiny.compose(*overrides)
        return
    with pytest.raises(UserError, match="must be the router's, 2"):
        tiny.compose(*overrides)


@pytest.mark.parametrize(
    "balancer",
    ["sequence", "batch", "switch", "expert", "communication, devices: 4, device_limit: 1"],
)
def test_P1_what_is_counted_is_counted_in_whole_numbers(balancer: str) -> None:
    """fp32 would lose some counts over a batch of 63 million tokens."""
    model = tiny.build(
        *tiny.FP32, f"{tiny.FFN}.balance=[{{name: {balancer}}}]", f"{tiny.ROUTER}.groups=4"
    )
    ffn, given = tiny.moe(model), tiny.context()
    (sums,) = ffn(torch.randn(2, 8, 32), given)[1].sums
    counted = {name: value.dtype for name, value in sums.items() if name != "share_NE"}
    assert set(counted.values()) == {torch.int64}
    assert {"chosen_NE", "tokens_N"} <= set(counted)
