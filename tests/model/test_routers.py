"""Every routing strategy against the slow reference: random and adversarial scores, padding, capacities, gradients."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import routing_reference as reference
import torch
from routing_reference import Assigned, Rows
from tiers import first_by_default
from torch import Tensor, nn

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Router, Routing
from core.testing import bench

from . import tiny

EXPERTS = 8
NO_BIAS = [0.0] * EXPERTS


def section(name: str, **keys: Any) -> str:
    """The override that makes this router the layer's, and nothing else."""
    written = ", ".join(f"{key}: {value}" for key, value in {"name": name, **keys}.items())
    return (
        f"{tiny.ROUTER}={{{written}}}".replace("None", "null")
        .replace("True", "true")
        .replace("False", "false")
    )


def overrides(name: str, *, experts: int = EXPERTS, **keys: Any) -> tuple[str, ...]:
    """The overrides for a recipe with this router, routed experts only, and no balancer."""
    free = {"groups": 1, "group_limit": None} if name.startswith("deepseek") else {}
    scaled = free or name in ("forced_balance", "hash_gated")
    given = {"top_k": 2, "scale": 1.0, **free} if scaled else {}
    layer = (f"{tiny.FFN}.experts={experts}", f"{tiny.FFN}.shared_experts=0", f"{tiny.BALANCE}=[]")
    return (section(name, **{**given, **keys}), *layer)


@cache
def _layer(*wanted: str) -> Any:
    return tiny.moe(tiny.build(*wanted))


def layer(name: str, *more: str, experts: int = EXPERTS, **keys: Any) -> Any:
    """The first expert layer of a model with this router."""
    return deepcopy(_layer(*overrides(name, experts=experts, **keys), *more))


def router(name: str, experts: int = EXPERTS, **keys: Any) -> Any:
    """A router whose logits are the first numbers of its input."""
    made = deepcopy(_layer(*overrides(name, experts=experts, **keys)).router)
    assert isinstance(made, Router)
    if hasattr(made, "centroids"):
        made.centroids.weight.data.copy_(torch.eye(*made.centroids.weight.shape))
    return made


def routed(one: Router, x_TD: Tensor, context: SequenceContext) -> Routing:
    result: Routing = one(x_TD, lambda scores_TE: scores_TE, context)
    return result


# ---- what they are tried on


@dataclass(frozen=True)
class Batch:
    """Which tokens are there: B rows of flags."""

    rows: list[list[bool]]

    def context(self, **rest: Any) -> SequenceContext:
        valid_BL = torch.tensor(self.rows, dtype=torch.bool).view(len(self.rows), -1)
        return tiny.context(*valid_BL.shape, valid_BL=valid_BL, **rest)

    @property
    def flat(self) -> list[bool]:
        return [flag for row in self.rows for flag in row]


def lengths(*valid: int, length: int = 9) -> Batch:
    return Batch([[place < count for place in range(length)] for count in valid])


BATCHES = {
    "three sequences": lengths(9, 9, 9),
    "padded": lengths(9, 4, 0, 1),
    "padding between": Batch(
        [[True, False, False, True, True, False, True], [False] * 3 + [True] * 4]
    ),
    "all masked": lengths(0, 0),
    "one token": lengths(1, length=1),
    "one valid token": lengths(0, 1),
    "fewer tokens than experts": lengths(3, length=3),
    "no token": Batch([[]]),
}


def logits_of(kind: str, tokens: int, experts: int = EXPERTS, seed: int = 0) -> Tensor:
    """Random ones; a tie of all experts; one expert far above the others, or far below."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, dtype=torch.float64, generator=generator)
    if kind == "ties":
        return torch.zeros_like(logits_TE)
    far = {"random": 0.0, "one takes all": 12.0, "one takes none": -12.0}[kind]
    return logits_TE + far * (torch.arange(experts) == 5)


LOGITS = ("random", "ties", "one takes all", "one takes none")


def inputs(logits_TE: Tensor) -> Tensor:
    """Tokens that give these logits."""
    return nn.functional.pad(logits_TE, (0, 32 - logits_TE.shape[1]))


# ---- the routers beside their references


@dataclass(frozen=True)
class Case:
    """A router's settings, and the reference's result for logits, groups, and the router itself (for its chance)."""

    name: str
    keys: dict[str, Any]
    expected: Callable[[Rows, Batch, Any, SequenceContext], list[Assigned]]
    ties: bool = False  # whether the sheet says who wins a tie


def _groups(keys: dict[str, Any], batch: Batch, default: str) -> list[list[int]]:
    return reference.groups_of(batch.rows, keys.get("group", default), keys.get("chunk"))


def v3(**keys: Any) -> Case:
    return Case(
        "deepseek_v3",
        keys,
        lambda rows, *_: reference.deepseek_v3(rows, NO_BIAS, **{"top_k": 2, **keys}),
    )


def v2(**keys: Any) -> Case:
    return Case(
        "deepseek_v2", keys, lambda rows, *_: reference.deepseek_v2(rows, **{"top_k": 2, **keys})
    )


def draws(one: Any, context: SequenceContext) -> list[float]:
    """The numbers that decide over second experts."""
    result: list[float] = one.chance.of_tokens(context, "second expert").tolist()
    return result


def gshard(**keys: Any) -> Case:
    def expected(rows: Rows, batch: Batch, one: Any, context: SequenceContext) -> list[Assigned]:
        chance = None if keys.get("second") == "always" else draws(one, context)
        factor = keys.get("capacity_factor", 1.0)
        return reference.gshard(
            rows, _groups(keys, batch, "sequence"), capacity_factor=factor, chance=chance
        )

    return Case("gshard", keys, expected, ties=True)


def switch(**keys: Any) -> Case:
    def expected(rows: Rows, batch: Batch, *_: Any) -> list[Assigned]:
        factor = keys.get("capacity_factor", 1.25)
        return reference.switch(rows, _groups(keys, batch, "batch"), capacity_factor=factor)

    return Case("switch", keys, expected, ties=True)


def expert_choice(**keys: Any) -> Case:
    def expected(rows: Rows, batch: Batch, *_: Any) -> list[Assigned]:
        return reference.expert_choice(rows, _groups(keys, batch, "batch"), top_k=keys["top_k"])

    return Case("expert_choice", keys, expected)


def forced(**keys: Any) -> Case:
    def expected(rows: Rows, batch: Batch, one: Any, context: SequenceContext) -> list[Assigned]:
        first = context.first_sequence * context.tokens_BL.shape[1]
        return reference.forced_balance(rows, [first + t for t in range(len(rows))], **keys)

    return Case("forced_balance", keys, expected, ties=True)


def hash_gated(**keys: Any) -> Case:
    def expected(rows: Rows, batch: Batch, one: Any, context: SequenceContext) -> list[Assigned]:
        settings = {key: value for key, value in keys.items() if key != "top_k"}
        ids = context.tokens_BL.flatten().tolist()
        return reference.hash_gated(rows, one.table.view(-1, one.top_k).tolist(), ids, **settings)

    return Case("hash_gated", keys, expected, ties=True)


CASES = {
    "deepseek_v3": v3(),
    "deepseek_v3, groups": v3(groups=4, group_limit=2, scale=2.5),
    "deepseek_v3, softmax": v3(affinity="softmax", top_k=3),
    "deepseek_v3, sqrt_softplus": v3(affinity="sqrt_softplus", top_k=3, scale=1.5),
    "deepseek_v3, sqrt_softplus in groups": v3(
        affinity="sqrt_softplus", groups=4, group_limit=2, normalise=False
    ),
    "hash_gated": hash_gated(top_k=3, scale=1.5),
    "hash_gated, sigmoid": hash_gated(top_k=2, affinity="sigmoid"),
    "hash_gated, one plain gate": hash_gated(top_k=1, normalise=False, affinity="softmax"),
    "deepseek_v3, not normalised": v3(normalise=False, scale=1.5),
    "deepseek_v3, top-1": v3(normalise=False, top_k=1),
    "deepseek_v3, groups by their best expert": v3(top_k=4, groups=2, group_limit=1, group_score=1),
    "deepseek_v3, groups by their best three": v3(top_k=2, groups=2, group_limit=1, group_score=3),
    "deepseek_v2": v2(),
    "deepseek_v2, groups": v2(top_k=3, groups=4, group_limit=2, scale=16.0),
    "deepseek_v2, one group each": v2(top_k=1, groups=8, group_limit=3),
    "gshard": gshard(),
    "gshard, batch": gshard(group="batch"),
    "gshard, always": gshard(second="always"),
    "gshard, no capacity": gshard(capacity_factor=0.0),
    "gshard, small capacity": gshard(capacity_factor=0.3, second="always", group="batch"),
    "gshard, more capacity than tokens": gshard(capacity_factor=20.0),
    "gshard_dropless": Case(
        "gshard_dropless", {}, lambda rows, *_: reference.gshard_dropless(rows)
    ),
    "gshard_dropless, normalised": Case(
        "gshard_dropless",
        {"top_k": 3, "normalise": True},
        lambda rows, *_: reference.gshard_dropless(rows, top_k=3, normalise=True),
    ),
    "switch": switch(),
    "switch, sequence": switch(group="sequence"),
    "switch, small capacity": switch(group="sequence", capacity_factor=0.5),
    "switch, no capacity": switch(capacity_factor=0.0),
    "switch, more capacity than tokens": switch(capacity_factor=20.0),
    "expert_choice": expert_choice(top_k=2),
    "expert_choice, sequence": expert_choice(top_k=2, group="sequence"),
    "expert_choice, chunks": expert_choice(top_k=2, group="sequence", chunk=4),
    "expert_choice, every expert takes every token": expert_choice(top_k=8),
    "forced_balance": forced(top_k=2),
    "forced_balance, three of eight": forced(top_k=3, scale=2.5),
}


@dataclass(frozen=True)
class Both:
    """The routing and the reference's assignments for the same logits, with the centroids of each."""

    routing: Routing
    centroids: Tensor
    expected: list[Assigned]
    leaf: Tensor


def both(name: str, logits_TE: Tensor, batch: Batch, **rest: Any) -> Both:
    case, context = CASES[name], batch.context(**rest)
    one = router(case.name, **case.keys)
    leaf = one.centroids.weight.detach().clone().requires_grad_()
    x_TD = inputs(logits_TE)
    expected = case.expected([leaf @ x_D for x_D in x_TD], batch, one, context)
    wanted = [a for a in expected if batch.flat[a.token]]
    return Both(routed(one, x_TD, context), one.centroids.weight, wanted, leaf)


def kept_of(routing: Routing) -> Tensor:
    return (
        torch.ones_like(routing.token_A, dtype=torch.bool)
        if routing.kept_A is None
        else routing.kept_A
    )


def found(routing: Routing, valid: list[bool]) -> dict[tuple[int, int], tuple[bool, float]]:
    """Kept and gate by (token, expert), of valid tokens."""
    columns = (routing.token_A, routing.expert_A, kept_of(routing), routing.gate_A)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    listed = [((token, expert), (kept, gate)) for token, expert, kept, gate in rows if valid[token]]
    assert len(dict(listed)) == len(listed), "an expert has the same token twice"
    return dict(listed)


SCORES_AND_BATCHES = [
    *(("random", batch) for batch in BATCHES),
    *((kind, "padded") for kind in LOGITS[1:]),
]
"""Random scores on every batch; adversarial ones where rows are full, partly padded, empty and of one token."""


@pytest.mark.parametrize(("kind", "batch"), SCORES_AND_BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_the_routing_is_the_references(name: str, batch: str, kind: str) -> None:
    """Tokens, experts, gates, kept, load before drops, drops (P6: padding in neither); of ties what they determine."""
    valid = BATCHES[batch].flat
    pair = both(name, logits_of(kind, len(valid)), BATCHES[batch], step=3, first_sequence=5)
    actual = found(pair.routing, valid)
    wanted = {(a.token, a.expert): (a.kept, a.gate.item()) for a in pair.expected}
    if kind == "ties" and not CASES[name].ties:
        side = (
            1 if CASES[name].name == "expert_choice" else 0
        )  # how many tokens an expert has, or experts a token
        assert sorted(place[side] for place in actual) == sorted(place[side] for place in wanted)
        assert all(kept for kept, _ in actual.values())
        gates, expected = (
            sorted(g for _, g in actual.values()),
            sorted(g for _, g in wanted.values()),
        )
    else:
        assert {at: kept for at, (kept, _) in actual.items()} == {
            at: kept for at, (kept, _) in wanted.items()
        }
        gates, expected = [actual[at][1] for at in wanted], [g for _, g in wanted.values()]
        loads = [sum(a.expert == e for a in pair.expected) for e in range(EXPERTS)]
        assert pair.routing.load(torch.tensor(valid, dtype=torch.bool)).tolist() == loads
    assert int(pair.routing.dropped(torch.tensor(valid, dtype=torch.bool))) == sum(
        not a.kept for a in pair.expected
    )
    assert gates == pytest.approx(expected, rel=1e-10, abs=0)


@pytest.mark.parametrize(
    "batch", first_by_default(sorted(BATCHES, key=lambda batch: batch != "padded"))
)
@pytest.mark.parametrize("name", CASES)
def test_gates_carry_the_references_gradient_to_the_centroids(name: str, batch: str) -> None:
    """Every kept assignment of a valid token has a weight of its own in the objective."""
    valid_T = torch.tensor(BATCHES[batch].flat, dtype=torch.bool)
    weight_TE = torch.linspace(1, 2, len(valid_T) * EXPERTS, dtype=torch.float64).view(-1, EXPERTS)
    pair = both(name, logits_of("random", len(valid_T)), BATCHES[batch])
    routing = pair.routing
    counts_A = kept_of(routing) & valid_T[routing.token_A]
    (routing.gate_A * weight_TE[routing.token_A, routing.expert_A])[counts_A].sum().backward()
    gates = [a.gate * weight_TE[a.token, a.expert] for a in pair.expected if a.kept]
    if gates:
        torch.stack(gates).sum().backward()
    expected = torch.zeros_like(pair.leaf) if pair.leaf.grad is None else pair.leaf.grad
    torch.testing.assert_close(pair.centroids.grad, expected, rtol=1e-10, atol=1e-13)
    learns = name not in ("gshard, no capacity", "switch, no capacity") and any(BATCHES[batch].flat)
    assert bool(expected.any()) == learns


@pytest.mark.parametrize("name", CASES)
def test_scores_and_logits_are_unbiased_affinities(name: str) -> None:
    """Softmax, or what the paper has; in fp64 in an fp64 model."""
    logits_TE = logits_of("random", 18)
    routing = both(name, logits_TE, lengths(9, 9)).routing
    usual = {"deepseek_v3": "sigmoid", "forced_balance": "sigmoid", "hash_gated": "sqrt_softplus"}
    case = CASES[name]
    affinity = case.keys.get("affinity", usual.get(case.name, "softmax"))
    of = reference.AFFINITIES[affinity]
    torch.testing.assert_close(routing.logits_TE, logits_TE, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        routing.scores_TE, torch.stack([of(row) for row in logits_TE]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", CASES)
def test_lists_are_token_major_where_they_say_so(name: str) -> None:
    routing = both(name, logits_of("random", 18), lengths(9, 9)).routing
    if CASES[name].name == "expert_choice":
        assert routing.choices == 0
        return
    choices = {"gshard": 2, "switch": 1}.get(CASES[name].name, CASES[name].keys.get("top_k", 2))
    assert routing.choices == choices
    assert routing.token_A.tolist() == [t for t in range(18) for _ in range(choices)]
    assert routing.choice_A.tolist() == list(range(choices)) * 18


# ---- what each is known for


@pytest.mark.parametrize("kind", ["random", "balanced"])
def test_hash_takes_the_tables_expert_and_learns_nothing(kind: str) -> None:
    one, context = hashed(kind), lengths(9, 4).context()
    routing = routed(one, torch.randn(18, 32, dtype=torch.float64, requires_grad=True), context)
    assert routing.expert_A.tolist() == one.table[context.tokens_BL.flatten()].tolist()
    assert routing.gate_A.tolist() == [1.0] * 18
    assert not routing.gate_A.requires_grad
    assert not list(one.parameters())
    assert (one.table.dtype, one.table.shape) == (torch.int64, (tiny.VOCABULARY,))
    assert "table" in one.state_dict()
    assert (routing.choices, one.top_k, int(routing.dropped(context.valid().flatten()))) == (
        1,
        1,
        0,
    )


def hashed(
    kind: str, counts: list[int] | None = None, *, experts: int = EXPERTS, **place: int
) -> Any:
    """A hash router over training data with these counts, in the layer and under the seed of `place`."""
    one, around = (
        layer("hash", map=kind).router,
        bench.build_context(bench.KitPrecision(torch.float64)),
    )
    counted = [3] * tiny.VOCABULARY if counts is None else counts
    build = replace(
        around, vocabulary=len(counted), token_counts=lambda: torch.tensor(counted), **place
    )
    made = type(one)(one.config, build, experts=experts)
    made.reset_parameters()
    return made


def test_the_random_map_is_uniform_and_differs_by_layer_and_seed() -> None:
    """Every expert has an eighth of 30,000 ids within 4 standard deviations; two maps agree in an eighth of them."""
    tables = [
        hashed("random", [1] * 30_000, seed=s, layer=n).table for s, n in ((0, 1), (0, 2), (1, 1))
    ]
    spread = 4 * (30_000 * 7 / 64) ** 0.5
    for table in tables:
        assert (table.bincount(minlength=8) - 3750).abs().max() < spread
    for other in tables[1:]:
        assert abs(int((tables[0] == other).sum()) - 3750) < spread
    assert torch.equal(tables[0], hashed("random", [1] * 30_000, seed=0, layer=1).table)
    assert torch.equal(
        tables[0][:100], hashed("random", [5] * 100, seed=0, layer=1).table
    )  # no other id has a say


def test_the_model_builds_each_layers_own_table() -> None:
    model = tiny.build(section("hash"), f"{tiny.BALANCE}=[]")
    tables = [tiny.moe(model, path).router.table for path in ("blocks.1", "blocks.2")]
    assert not torch.equal(*tables)
    assert torch.equal(tables[1], hashed("random", seed=0, layer=2).table)


def test_a_balanced_map_needs_data_or_a_checkpoint() -> None:
    """The router refuses to route without either, instead of sending every token to expert 0."""
    one, context = layer("hash", map="balanced").router, tiny.context(1, 4)
    x_TD = torch.zeros(4, 32, dtype=torch.float64)
    with pytest.raises(UserError, match=r"balanced.*token counts"):
        routed(one, x_TD, context)
    saved = hashed("balanced", [i * i % 37 for i in range(tiny.VOCABULARY)]).state_dict()
    one.load_state_dict(saved)
    assert (
        routed(one, x_TD, context).expert_A.tolist()
        == saved["table"][context.tokens_BL.flatten()].tolist()
    )


@pytest.mark.parametrize(
    "counts",
    [
        [7, 7, 7, 7, 7],
        [0] * 20,
        [1000 // (i + 1) for i in range(200)],
        [i * i % 37 for i in range(150)],
        [1] * 9 + [50],
    ],
)
@pytest.mark.parametrize("experts", [4, 8])
def test_the_balanced_map_is_the_references(counts: list[int], experts: int) -> None:
    table = hashed("balanced", counts, experts=experts).table
    assert table[:, None].tolist() == reference.balanced_table(counts, experts)


@pytest.mark.parametrize("width", [0.01, 0.25])
def test_switch_multiplies_its_input_by_addressed_noise_in_training_only(width: float) -> None:
    """Uniform in 1 - e to 1 + e; the same however the batch is split, another in the next step."""
    one, context = router("switch", jitter=width, experts=32), tiny.context(4, 50)
    ones_TD = torch.ones(200, 32, dtype=torch.float64)
    noise_TD = routed(one, ones_TD, context).logits_TE.detach()
    assert 1 - width <= noise_TD.min() < 1 - 0.99 * width
    assert 1 + width >= noise_TD.max() > 1 + 0.99 * width
    assert abs(float(noise_TD.mean()) - 1) < 3 * width / (3 * 6400) ** 0.5
    assert noise_TD.unique().numel() == 6400
    halves = [tiny.context(2, 50, first_sequence=first) for first in (0, 2)]
    parts = [routed(one, ones_TD[:100], half).logits_TE for half in halves]
    assert torch.equal(torch.cat(parts), noise_TD)
    assert not torch.equal(routed(one, ones_TD, tiny.context(4, 50, step=1)).logits_TE, noise_TD)
    one.eval()
    assert torch.equal(routed(one, ones_TD, context).logits_TE, ones_TD)


def test_forced_balance_loads_every_expert_equally() -> None:
    """Whatever the tokens are, and however the batch is split."""
    one, x_TD = router("forced_balance", top_k=3), torch.randn(16, 32, dtype=torch.float64)
    whole = routed(one, x_TD, tiny.context(2, 8))
    assert whole.load(torch.ones(16, dtype=torch.bool)).tolist() == [6] * 8
    second = routed(one, x_TD[8:], tiny.context(1, 8, first_sequence=1))
    assert second.expert_A.tolist() == whole.expert_A[24:].tolist()
