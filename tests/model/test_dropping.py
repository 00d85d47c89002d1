"""Dropped tokens and dependence between tokens: expert capacity, device budgets, causality, and rejected recipes."""

from typing import Any

import pytest
import routing_reference as reference
import torch
from tiers import first_by_default
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Routing

from . import tiny
from .test_routers import (
    BATCHES,
    CASES,
    EXPERTS,
    LOGITS,
    SCORES_AND_BATCHES,
    both,
    found,
    inputs,
    layer,
    logits_of,
    routed,
    router,
    section,
)

DROPPING = [
    name for name in CASES if name.startswith(("gshard", "switch")) and "dropless" not in name
]


# ---- places at experts


@pytest.mark.parametrize(("kind", "batch"), SCORES_AND_BATCHES)
@pytest.mark.parametrize("name", DROPPING)
def test_no_expert_exceeds_its_capacity(name: str, batch: str, kind: str) -> None:
    """And what is kept and what is dropped add up to what was assigned; padding is not kept."""
    case, given = CASES[name], BATCHES[batch]
    valid_T, choices = torch.tensor(given.flat, dtype=torch.bool), 2 if case.name == "gshard" else 1
    routing = both(name, logits_of(kind, len(valid_T)), given).routing
    assert routing.kept_A is not None
    assert not routing.kept_A[~valid_T[routing.token_A]].any()
    kept, dropped = int(routing.kept_A.sum()), int(routing.dropped(valid_T))
    assert kept + dropped == int(routing.load(valid_T).sum()) == choices * int(valid_T.sum())
    factor = case.keys.get("capacity_factor", 1.0 if choices == 2 else 1.25)
    over = case.keys.get("group", "sequence" if choices == 2 else "batch")
    for group in reference.groups_of(given.rows, over):
        here_A = routing.kept_A & torch.isin(routing.token_A, torch.tensor(group))
        most = reference.ceiling(factor, choices * len(group), EXPERTS)
        assert int(routing.expert_A[here_A].bincount(minlength=EXPERTS).max()) <= most


@pytest.mark.parametrize(
    ("factor", "tokens", "places"),
    [(1.0, 8, 1), (1.0, 9, 2), (0.28, 200, 7), (1.25, 32, 5), (0.1, 1, 1), (0.0, 8, 0)],
)
def test_capacity_is_rounded_up_from_the_factor_as_it_is_written(
    factor: float, tokens: int, places: int
) -> None:
    """0.28 x 200 / 8 is 7 places, although 0.28 x 200 is more than 56 in floating point."""
    logits_TE = logits_of("one takes all", tokens)
    routing = routed(
        router("switch", capacity_factor=factor), inputs(logits_TE), tiny.context(1, tokens)
    )
    assert [kept for kept, _ in found(routing, [True] * tokens).values()] == [
        t < places for t in range(tokens)
    ]


def by_hand(*wishes: tuple[int, int]) -> Tensor:
    """Logits of tokens that each want one expert, and then another one with the same probability to the last bit."""
    logits_TE = torch.full((len(wishes), EXPERTS), -40.0, dtype=torch.float64)
    for row, (first, second) in zip(logits_TE, wishes, strict=True):
        row[first] = row[second] = 0.0
    return logits_TE


def test_A13_gshards_first_choices_go_before_all_second_ones() -> None:
    """One place at expert 5: token 1 wants it first, token 0 second, and token 0 comes earlier in vain."""
    routing = routed(
        router("gshard", second="always"), inputs(by_hand((1, 5), (5, 7))), tiny.context(1, 2)
    )
    kept = {place: kept for place, (kept, _) in found(routing, [True] * 2).items()}
    assert kept == {(0, 1): True, (0, 5): False, (1, 5): True, (1, 7): True}


@pytest.mark.parametrize(("factor", "kept"), [(1.0, False), (4.0, True)])
def test_A13_gshards_counter_grows_where_chance_says_no(factor: float, kept: bool) -> None:
    """Algorithm 1 counts outside the `if`: token 0's unlucky second choice takes the only place of expert 7."""
    logits_TE = by_hand((0, 7), (1, 7))
    logits_TE[0, 7] = -39.0  # a gate of 1e-17: no draw is below it
    routing = routed(
        router("gshard", capacity_factor=factor), inputs(logits_TE), tiny.context(1, 2)
    )
    result = found(routing, [True] * 2)
    assert not result[0, 7][0]
    assert result[1, 7][0] == kept
    assert result[0, 0][0]
    assert result[1, 1][0]


@pytest.mark.parametrize(
    ("first", "second"), [(0.5, 0.1), (0.3, 0.2), (0.6, 0.3), (0.35, 0.3), (0.4, 0.4)]
)
def test_A13_gshard_keeps_the_second_choice_with_twice_its_gate(
    first: float, second: float
) -> None:
    """Its gate after normalising, g2 / (g1 + g2); 100,000 draws with more places than tokens, within 3 sigma."""
    rest = (1 - first - second) / 6
    logits_TE = (
        torch.tensor([first, second, *[rest] * 6], dtype=torch.float64).log().repeat(100_000, 1)
    )
    context = tiny.context(100, 1000)
    routing = routed(router("gshard", capacity_factor=8.0), inputs(logits_TE), context)
    wanted = min(1.0, 2 * second / (first + second))
    kept_TK = routing.kept_A.view(-1, 2)
    assert kept_TK[:, 0].all()
    assert (
        abs(int(kept_TK[:, 1].sum()) - 100_000 * wanted)
        <= 3 * (100_000 * wanted * (1 - wanted)) ** 0.5
    )
    sequences_B = kept_TK[:, 1].view(100, 1000).sum(dim=1)
    assert wanted == 1 or len(sequences_B.unique()) > 10


def test_P9_chance_depends_on_the_step_and_on_no_splitting_of_the_batch() -> None:
    """And it is another in every layer."""
    logits_TE = logits_of("random", 64)
    one = router("gshard", capacity_factor=8.0)
    whole = routed(one, inputs(logits_TE), tiny.context(4, 16)).kept_A
    parts = [
        routed(
            one, inputs(logits_TE[32 * i : 32 * (i + 1)]), tiny.context(2, 16, first_sequence=2 * i)
        ).kept_A
        for i in range(2)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(parts[0], parts[1])
    assert not torch.equal(
        routed(one, inputs(logits_TE), tiny.context(4, 16, step=1)).kept_A, whole
    )
    model = tiny.build(section("gshard", capacity_factor=8.0), f"{tiny.BALANCE}=[]")
    other = tiny.moe(model, "blocks.2").router
    other.centroids.weight.data.copy_(one.centroids.weight)
    assert not torch.equal(routed(other, inputs(logits_TE), tiny.context(4, 16)).kept_A, whole)


@pytest.mark.parametrize(
    ("name", "keys"), [("gshard", {"second": "always"}), ("switch", {"group": "sequence"})]
)
def test_a_token_that_every_expert_turns_away_is_left_as_it_is(
    name: str, keys: dict[str, Any]
) -> None:
    """The routed output of a fully overflowed token is exactly 0, so the block passes its residual on."""
    ffn, context = layer(name, capacity_factor=1.0, **keys), tiny.context(2, 8)
    ffn.router.centroids.weight.data.copy_(torch.eye(EXPERTS, 32))
    x_BLD = inputs(by_hand(*[(2, 4)] * 16)).view(2, 8, 32)
    x_BLD[:, :, 8:] = torch.randn(
        2, 8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    y_BLD, record = ffn(x_BLD.requires_grad_(), context)
    places, choices = (2, 2) if name == "gshard" else (1, 1)
    assert not y_BLD[:, places:].any()
    assert y_BLD[:, :places].any(dim=-1).all()
    assert int(record.dropped) == 2 * choices * (8 - places)
    assert record.load_E.tolist() == (
        [0, 0, 16, 0, 16, 0, 0, 0] if choices == 2 else [0, 0, 16, 0, 0, 0, 0, 0]
    )
    y_BLD.sum().backward()
    assert not x_BLD.grad[:, places:].any()


@pytest.mark.parametrize(("training", "places"), [(True, 8), (False, 16)])
def test_switch_has_a_capacity_of_its_own_in_evaluation(training: bool, places: int) -> None:
    one = router("switch", capacity_factor=2.0, eval_capacity_factor=4.0).train(training)
    routing = routed(one, inputs(logits_of("one takes all", 32)), tiny.context(2, 16))
    assert int(routing.kept_A.sum()) == places
    assert one.capacity_factor == 2.0


# ---- DeepSeek-V2's budget of devices


def dropping(
    devices: int = 4,
    factor: float = 1.0,
    keep: float = 0.1,
    shared: int = 0,
    name: str = "deepseek_v2",
) -> Any:
    """A layer whose router drops nothing itself, and which has a budget for each device."""
    more = (
        f"{tiny.FFN}.token_dropping={{devices: {devices}, capacity_factor: {factor}, keep_sequences: {keep}}}",
        f"{tiny.FFN}.shared_experts={shared}",
    )
    return layer(name, *more)


def protected(ffn: Any, context: SequenceContext, keep: float) -> list[bool]:
    """Whether each token's sequence is one of those that are never dropped."""
    drawn = ffn.sequence_chance.of_sequences(context, "never dropped").tolist()
    return [number < keep for number in drawn for _ in range(context.tokens_BL.shape[1])]


def expected(
    ffn: Any, x_BLD: Tensor, context: SequenceContext, routing: Routing, kept: list[bool]
) -> Tensor:
    """The layer's output from the kept assignments, one at a time."""
    x_TD, y_TD = x_BLD.flatten(0, 1), torch.zeros_like(x_BLD.flatten(0, 1))
    for a, (token, expert) in enumerate(
        zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True)
    ):
        if kept[a]:
            gate, up = (ffn.routed.gate_up.weight[expert] @ x_TD[token]).chunk(2)
            y_D = ffn.routed.down.weight[expert] @ (gate * gate.sigmoid() * up)
            y_TD = y_TD.index_add(0, torch.tensor([token]), (routing.gate_A[a] * y_D)[None])
    return y_TD.view_as(x_BLD)


BUDGETS = [(4, 1.0), (2, 0.5), (8, 0.0), (1, 1.0), (4, 8.0)]
BUDGET_CASES = [
    *(("padding between", *budget, 0.4, kind) for budget in BUDGETS for kind in LOGITS),
    *(
        (batch, 4, 1.0, keep, "random")
        for batch in ("three sequences", "all masked")
        for keep in (0.0, 0.4, 1.0)
    ),
]
"""Every budget under every kind of scores; every share of protected sequences on other batches."""


@pytest.mark.parametrize(
    "name", ["deepseek_v2", "deepseek_v3"]
)  # the second's gates are in another order
@pytest.mark.parametrize(("batch", "devices", "factor", "keep", "kind"), BUDGET_CASES)
def test_device_budgets_are_the_references(
    batch: str, devices: int, factor: float, keep: float, kind: str, name: str
) -> None:
    """Lowest affinity first, earlier ones kept among equals, protected sequences counted first and never dropped."""
    ffn, given = dropping(devices, factor, keep, name=name), BATCHES[batch]
    context, valid = given.context(step=2, first_sequence=3), given.flat
    ffn.router.centroids.weight.data.copy_(torch.eye(EXPERTS, 32))
    rest_TD = torch.randn(
        len(valid), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    x_TD = inputs(logits_of(kind, len(valid))) + rest_TD * (
        torch.arange(32) >= EXPERTS
    )  # the router reads the logits
    x_BLD = x_TD.view(*context.tokens_BL.shape, 32)
    with torch.no_grad():
        y_BLD, record = ffn(x_BLD, context)
        routing = routed(ffn.router, x_TD, context)
        pairs = list(zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True))
        safe = protected(ffn, context, keep)
        kept = reference.dropped_over_budget(
            pairs, routing.scores_TE, valid, safe, devices=devices, capacity_factor=factor
        )
        wanted = expected(ffn, x_BLD, context, routing, kept)
    valid_BL = context.valid()
    torch.testing.assert_close(y_BLD[valid_BL], wanted[valid_BL], rtol=1e-10, atol=1e-12)
    assigned = 2 * sum(valid)
    assert int(record.dropped) == assigned - sum(kept)
    assert record.load_E.tolist() == routing.load(valid_BL.flatten()).tolist()


def test_the_lowest_affinity_is_dropped_first() -> None:
    """Four tokens want the same two experts of device 0, whose budget is 4 of their 8 assignments."""
    ffn, context = dropping(2, 1.0, 0.0), tiny.context(1, 4)
    ffn.router.centroids.weight.data.copy_(torch.eye(EXPERTS, 32))
    logits_TE = torch.zeros(4, EXPERTS, dtype=torch.float64)
    logits_TE[:, 0] = torch.tensor([1.0, 5.0, 3.0, 4.0])
    logits_TE[:, 1] = torch.tensor([0.9, 1.0, 2.9, 1.0])
    y_BLD, record = ffn(inputs(logits_TE)[None], context)
    assert int(record.dropped) == 4
    nothing = (y_BLD[0] == 0).all(dim=-1)
    assert nothing.tolist() == [
        True,
        False,
        False,
        False,
    ]  # token 2 keeps both of its experts, 1 and 3 the first


def test_about_a_tenth_of_the_sequences_is_never_dropped() -> None:
    """The share of 10,000 is within 3 sigma; they alone pass without a budget, in all layers, and change by step."""
    more = (
        f"{tiny.FFN}.token_dropping={{devices: 2, capacity_factor: 0.0}}",
        f"{tiny.FFN}.shared_experts=0",
    )
    model = tiny.build(section("deepseek_v2", top_k=2, groups=1), f"{tiny.BALANCE}=[]", *more)
    x_BLD = torch.randn(
        10_000, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        passed = [
            tiny.moe(model, path)(x_BLD, tiny.context(10_000, 1, step=step))[0]
            .any(dim=-1)
            .flatten()
            for path, step in (("blocks.1", 0), ("blocks.2", 0), ("blocks.1", 1))
        ]
        second = (
            tiny.moe(model)(x_BLD[5000:], tiny.context(5000, 1, first_sequence=5000))[0]
            .any(dim=-1)
            .flatten()
        )
    assert abs(int(passed[0].sum()) - 1000) <= 90
    assert torch.equal(passed[0], passed[1])
    assert torch.equal(passed[0][5000:], second)
    assert abs(int((passed[0] & passed[2]).sum()) - 100) <= 30


def test_nothing_is_dropped_in_evaluation() -> None:
    ffn, context = dropping(factor=0.0, keep=0.0, shared=1), tiny.context(2, 8)
    x_BLD = torch.randn(2, 8, 32, dtype=torch.float64)
    assert int(ffn(x_BLD, context)[1].dropped) == 32
    ffn.eval()
    y_BLD, record = ffn(x_BLD, context)
    assert int(record.dropped) == 0
    plain = layer("deepseek_v2", f"{tiny.FFN}.shared_experts=1").eval()
    assert torch.equal(y_BLD, plain(x_BLD, context)[0])


def test_a_dropped_assignment_has_no_gradient() -> None:
    """Not through its gate either: with everything dropped neither router nor experts learn."""
    ffn, context = dropping(factor=0.0, keep=0.0), tiny.context(2, 8)
    x_BLD = torch.randn(2, 8, 32, dtype=torch.float64)
    ffn(x_BLD, context)[0].sum().backward()
    assert not any(slope.any() for slope in tiny.gradients(ffn).values())


def test_the_budget_leaves_losses_and_load_alone() -> None:
    """Both speak of what was chosen, before drops."""
    balance = f"{tiny.BALANCE}=[{{name: expert}}]"
    budget = f"{tiny.FFN}.token_dropping={{devices: 4, capacity_factor: 0.0}}"
    with_budget, without = (layer("deepseek_v2", balance, *more) for more in ((budget,), ()))
    x_BLD, context = torch.randn(2, 8, 32, dtype=torch.float64), tiny.context(2, 8)
    dropped, plain = with_budget(x_BLD, context)[1], without(x_BLD, context)[1]
    assert int(dropped.dropped) > 0
    assert torch.equal(dropped.load_E, plain.load_E)
    tiny.assert_equal(dropped.sums[0], plain.sums[0])


# ---- who sees whom


SEEN = {
    "deepseek_v3": {},
    "deepseek_v2": {},
    "gshard": {},
    "gshard, always, small capacity": {"second": "always", "capacity_factor": 0.5},
    "gshard, batch": {"group": "batch"},
    "gshard_dropless": {},
    "switch": {"capacity_factor": 0.5},
    "switch, sequence": {"group": "sequence", "capacity_factor": 0.5},
    "expert_choice": {"top_k": 2},
    "expert_choice, sequence": {"top_k": 2, "group": "sequence"},
    "expert_choice, chunks": {"top_k": 2, "group": "sequence", "chunk": 4},
    "hash": {},
    "hash_gated": {"top_k": 2},
    "forced_balance": {"top_k": 2},
    "deepseek_v2, device budget": {},
}


def changed(ffn: Any, seed: int) -> tuple[Tensor, int]:
    """Which of 2 x 8 outputs differ where the last token of the first sequence is another one; how many are dropped."""
    x_BLD = inputs(3 * logits_of("random", 16, seed=seed)).view(2, 8, 32)
    before = tiny.context(2, 8, seed=seed)
    tokens_BL, other_BLD = before.tokens_BL.clone(), x_BLD.clone()
    tokens_BL[0, -1] = (tokens_BL[0, -1] + 1) % tiny.VOCABULARY
    other_BLD[0, -1] = other_BLD[0, -1].roll(1)
    with torch.no_grad():
        (first, record), (second, _) = (
            ffn(x_BLD, before),
            ffn(other_BLD, SequenceContext.of(tokens_BL)),
        )
    return ((first - second).abs() > 1e-9).any(dim=-1), int(
        record.dropped
    )  # the order of a sum moves the last bits


@pytest.mark.parametrize("name", first_by_default(SEEN, keep=6))
def test_the_declared_causality_is_what_happens(name: str) -> None:
    """A later token moves earlier outputs of its sequence iff not causal; another sequence's iff batch dependent."""
    budget = (f"{tiny.FFN}.token_dropping={{devices: 4}}",) if name.endswith("budget") else ()
    ffn = layer(name.split(",")[0], *budget, **SEEN[name])
    if hasattr(ffn.router, "centroids"):
        ffn.router.centroids.weight.data.copy_(torch.eye(8, 32))
    seen = [changed(ffn, seed) for seed in range(60)]
    seen_BL = torch.stack([moved_BL for moved_BL, _ in seen]).any(dim=0)
    routing_properties = ffn.routing_properties
    assert bool(seen_BL[0, -1])
    assert bool(seen_BL[0, :-1].any()) == (not routing_properties.causal)
    assert bool(seen_BL[1].any()) == routing_properties.batch_dependent
    assert any(dropped for _, dropped in seen) == routing_properties.drops
    if not budget:
        able = ffn.router.capabilities_of(ffn.router.config)
        words = {
            "causal": routing_properties.causal,
            "batch_dependent": routing_properties.batch_dependent,
            "drops": routing_properties.drops,
        }
        assert able & words.keys() == {word for word, holds in words.items() if holds}


def test_expert_choice_leaks_the_future() -> None:
    """Eight tokens, one place at each expert: what a later token wants takes an earlier one's place."""
    one, context = router("expert_choice", top_k=1), tiny.context(1, 8)
    logits_TE = torch.zeros(8, 8, dtype=torch.float64)
    logits_TE[0, 0] = 2.0
    logits_TE[7, 0] = 1.0
    before = found(routed(one, inputs(logits_TE), context), [True] * 8)
    logits_TE[7, 0] = 3.0
    after = found(routed(one, inputs(logits_TE), context), [True] * 8)
    assert before[0, 0][0]
    assert (0, 0) not in after
    assert after[7, 0][0]


# ---- what cannot be


BUDGET = f"{tiny.FFN}.token_dropping={{devices: 2}}"
BIAS, SEQUENCE, EXPERT = (
    f"{tiny.BALANCE}=[{{name: {name}}}]" for name in ("bias", "sequence", "expert")
)
UNBALANCED = f"{tiny.BALANCE}=[]"
CHOSEN, EVEN, UNLEARNED = (
    "selects through the balancers' bias",
    "gives every token the same number of experts",
    "learns which experts to choose",
)
IMPOSSIBLE = {
    **{
        f"bias with {name}": ((section(name, **keys), BIAS), "balance.0", CHOSEN)
        for name, keys in (
            ("hash", {}),
            ("hash_gated", {"top_k": 2}),
            ("gshard", {}),
            ("gshard_dropless", {}),
            ("switch", {}),
            ("expert_choice", {"top_k": 2}),
            ("forced_balance", {"top_k": 2}),
        )
    },
    "a loss with hash": ((section("hash"), SEQUENCE), "balance.0", UNLEARNED),
    "a loss with hash_gated": (
        (section("hash_gated", top_k=2), SEQUENCE),
        "balance.0",
        UNLEARNED,
    ),
    "z_loss with hash_gated": (
        (section("hash_gated", top_k=2), f"{tiny.BALANCE}=[{{name: z_loss}}]"),
        "balance.0",
        UNLEARNED,
    ),
    "a budget with hash_gated": (
        (section("hash_gated", top_k=2), UNBALANCED, BUDGET),
        "token_dropping",
        UNLEARNED,
    ),
    "z_loss with hash": (
        (section("hash"), f"{tiny.BALANCE}=[{{name: z_loss}}]"),
        "balance.0",
        UNLEARNED,
    ),
    "expert with hash": ((section("hash"), EXPERT), "balance.0", UNLEARNED),
    "sequence with expert choice": (
        (section("expert_choice", top_k=2), SEQUENCE),
        "balance.0",
        EVEN,
    ),
    "switch loss with expert choice": (
        (section("expert_choice", top_k=2), f"{tiny.BALANCE}=[{{name: switch}}]"),
        "balance.0",
        EVEN,
    ),
    "a budget with expert choice": (
        (section("expert_choice", top_k=2), UNBALANCED, BUDGET),
        "token_dropping",
        EVEN,
    ),
    "a budget with gshard": (
        (section("gshard"), UNBALANCED, BUDGET),
        "token_dropping",
        "limits how many tokens",
    ),
    "a budget with switch": (
        (section("switch"), UNBALANCED, BUDGET),
        "token_dropping",
        "limits how many tokens",
    ),
    "a budget on devices that do not divide": (
        (f"{tiny.FFN}.token_dropping={{devices: 3}}",),
        "token_dropping.devices",
        "must divide experts = 8",
    ),
    "a capacity with expert choice": (
        (section("expert_choice", top_k=2, capacity_factor=1.0), UNBALANCED),
        "router.capacity_factor",
        "no capacity is needed",
    ),
    "groups with switch": (
        (section("switch", groups=2), UNBALANCED),
        "router.groups",
        "one expert",
    ),
    "chunks of a batch": (
        (section("expert_choice", top_k=2, chunk=4), UNBALANCED),
        "router.chunk",
        "group is sequence",
    ),
    "one gate, normalised": (
        (section("gshard_dropless", top_k=1, normalise=True), UNBALANCED),
        "router.normalise",
        "constant",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_combinations_are_refused_with_the_reason(name: str) -> None:
    """One sentence before anything is built: the key, and why."""
    overrides, key, reason = IMPOSSIBLE[name]
    with pytest.raises(UserError) as caught:
        tiny.compose(*overrides)
    assert f"model.blocks.moe.ffn.{key}" in str(caught.value)
    assert reason in str(caught.value)
