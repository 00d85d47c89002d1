"""Dispatch between ranks: results are those of one process, and a token crosses to a node once."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves

from core.contracts.context import SequenceContext
from core.contracts.dispatcher import Placement
from core.model.language_model import LanguageModel
from core.numerics import exchange
from core.numerics.grouped import grouped_product
from core.testing.forked_ranks import on_ranks
from plugins.all_to_all import dispatcher
from plugins.all_to_all.dispatcher import AllToAllDispatcher

from . import tiny
from .rank_cases import (
    SCATTERED,
    Case,
    Exchanges,
    Outcome,
    alone,
    on_this_rank,
    reached,
    tallies_by_hand,
)

TOKENS = {2: (5, 3), 4: (5, 0, 3, 2)}
MANY = (6, 1, 9, 4)
CASES: dict[int, dict[str, Case]] = {
    2: {
        "one node": Case(TOKENS[2], 2, SCATTERED[2], idle=(2,)),
        "two nodes, drops": Case(TOKENS[2], 1, drops=True),
    },
    4: {
        "one node": Case(TOKENS[4], 4, SCATTERED[4]),
        "two nodes, drops, an idle expert": Case(TOKENS[4], 2, SCATTERED[4], idle=(2,), drops=True),
        "two nodes, not token-major": Case(MANY, 2, drops=True, token_major=False),
        "four nodes": Case(TOKENS[4], 1),
        "no token anywhere": Case((0, 0, 0, 0), 2),
        "everything on one rank": Case(MANY, 2, ((), (), tuple(range(8)), ())),
        "wider gates": Case(MANY, 2, dtype=torch.float32),
        "bf16": Case(MANY, 2, dtype=torch.bfloat16, gate_dtype=torch.float32),
        "limited to 2 of 4 nodes": Case(MANY, 1, experts=16, top_k=4, groups=4, group_limit=2),
        "limited to 1 of 2 nodes": Case(MANY, 2, experts=16, top_k=4, groups=2, group_limit=1),
    },
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
MODEL = ("model.blocks.moe.count=1", *tiny.MTP)
RECOMPUTE = "recompute.blocks=[dense, moe]"
SEQUENCES = (slice(0, 2), slice(2, 3), slice(3, 3), slice(3, 6))
"""The sequences of each of four ranks in a batch of six."""


def crossed(world: int) -> dict[str, Case]:
    """The cross product of layouts and lists."""
    found = {}
    for per_node in (1, 2, 4)[: world.bit_length()]:
        for placed in (None, SCATTERED[world]):
            for drops in (False, True):
                for token_major in (False, True):
                    name = f"{per_node} {placed is None} {drops} {token_major}"
                    found[name] = Case(
                        TOKENS[world], per_node, placed, drops=drops, token_major=token_major
                    )
    return found


def on_forked_ranks(work: Any, world: int, backend: str = "gloo") -> list[Any]:
    """The results of a function on ranks; what the first call of an operator imports is imported before."""
    grouped_product(torch.ones(1, 1), torch.ones(1, 1, 1), torch.tensor([1]))
    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(work, Path(folder), world=world, backend=backend)


def run_cases(
    cases: dict[str, Case], world: int, *, copies: int = 1, device: str = "cpu"
) -> list[dict[str, Outcome]]:
    """The outcomes of all cases on each rank.

    Args:
        cases: the cases by name.
        world: the ranks of each case.
        copies: how many such sets of ranks work at the same time.
        device: `cpu` or `cuda`.
    """

    def work(rank: int) -> dict[str, Outcome]:
        if device == "cuda":
            torch.cuda.set_device(rank)
        mesh = init_device_mesh(device, (copies, world), mesh_dim_names=("data", "expert"))
        exchanges = Exchanges()
        found = {}
        for name, case in cases.items():
            found[name] = on_this_rank(case, mesh["expert"], exchanges, device)
        return found

    return on_forked_ranks(work, copies * world, "nccl" if device == "cuda" else "gloo")


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Outcome]]]:
    """The outcomes on two and on four ranks."""
    return {world: run_cases(cases, world) for world, cases in CASES.items()}


def assert_as_alone(case: Case, outcomes: list[Outcome]) -> None:
    """Compares outputs, gradients and tallies with a loop over assignments in fp64."""
    exact = alone(replace(case, dtype=torch.float64))
    for own, expected, tallies in zip(outcomes, exact, tallies_by_hand(case), strict=True):
        assert own.output.dtype == own.tokens.dtype == case.dtype
        assert own.gates.dtype == case.gate_dtype
        for name in ("output", "tokens", "gates"):
            assert_near(getattr(own, name), getattr(expected, name), case.dtype)
        assert list(own.weights) == list(expected.weights)
        for expert, gradient in own.weights.items():
            assert_near(gradient, expected.weights[expert], case.dtype)
        assert all(t.dtype == torch.int64 and t.ndim == 0 for t in own.tallies.values())
        assert {name: int(value) for name, value in own.tallies.items()} == tallies


def assert_near(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compares two tensors, relative to the largest element."""
    largest = max([1.0, *expected.abs().flatten().tolist()])
    limit = TOLERANCE[dtype] * largest
    torch.testing.assert_close(value.double(), expected.double(), rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, cases in CASES.items() for name in cases]
)
def test_outputs_gradients_and_tallies_are_those_of_one_process(
    ranks: dict[int, list[dict[str, Outcome]]], world: int, name: str
) -> None:
    assert_as_alone(CASES[world][name], [outcomes[name] for outcomes in ranks[world]])


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_and_list_gives_what_one_process_gives(world: int) -> None:
    cases = crossed(world)
    outcomes = run_cases(cases, world)
    for name, case in cases.items():
        assert_as_alone(case, [rank[name] for rank in outcomes])


@pytest.mark.full
def test_drawn_cases_give_what_one_process_gives() -> None:
    draw = random.Random(0)
    cases = {str(number): drawn(draw) for number in range(40)}
    outcomes = run_cases(cases, 4)
    for name, case in cases.items():
        assert_as_alone(case, [rank[name] for rank in outcomes])


def drawn(draw: random.Random) -> Case:
    """A case on four ranks: any number of tokens, experts anywhere."""
    experts = draw.randint(1, 12)
    places: list[list[int]] = [[], [], [], []]
    for expert in draw.sample(range(experts), experts):
        places[draw.randrange(4)].append(expert)
    return Case(
        tokens_R=tuple(draw.choice((0, 1, 5, 17)) for _ in range(4)),
        per_node=draw.choice((1, 2, 4)),
        placed=tuple(tuple(place) for place in places),
        experts=experts,
        top_k=draw.randint(1, min(experts, 5)),
        drops=draw.random() < 0.5,
        token_major=draw.random() < 0.5,
    )


@pytest.mark.full
def test_two_sets_of_ranks_share_a_process_group_and_do_not_meet() -> None:
    """Eight ranks: two copies of four that hold the experts, each on two nodes, with process groups of their own."""
    case = CASES[4]["two nodes, drops, an idle expert"]
    outcomes = run_cases({"case": case}, 4, copies=2)
    for copy in (outcomes[:4], outcomes[4:]):
        assert_as_alone(case, [rank["case"] for rank in copy])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs")
def test_two_gpus_give_what_one_process_gives_and_the_same_bits_again() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("this process has used a GPU and cannot be forked: run this file alone")
    cases = {**crossed(2), **CASES[2]}
    again = {f"{name} again": case for name, case in cases.items()}
    outcomes = run_cases({**cases, **again}, 2, device="cuda")
    for name, case in cases.items():
        assert_as_alone(case, [rank[name] for rank in outcomes])
        for rank in outcomes:
            first = tree_leaves(vars(rank[name]))
            second = tree_leaves(vars(rank[f"{name} again"]))
            assert all(map(torch.equal, tensors_of(first), tensors_of(second)))


def tensors_of(leaves: list[Any]) -> list[Tensor]:
    """The tensors among some values."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def test_every_rank_starts_the_same_exchanges_in_the_same_order(
    ranks: dict[int, list[dict[str, Outcome]]],
) -> None:
    """Ranks without a token, and without an expert, take part in each; the host reads the counts of each stage once."""
    for world, cases in CASES.items():
        for name, case in cases.items():
            kinds = []
            for rank in ranks[world]:
                kinds.append([(sent.ranks, sent.rows) for sent in rank[name].sent])
            assert kinds == [kinds[0]] * world
            stages = 1 if case.per_node in (1, world) else 2
            assert [sent.counts for sent in ranks[world][0][name].sent].count(None) == stages
            assert len(kinds[0]) == stages * (2 + 3 + 3)


@pytest.mark.parametrize(
    ("name", "limit"), [("limited to 2 of 4 nodes", 2), ("limited to 1 of 2 nodes", 1)]
)
def test_a_token_crosses_to_at_most_group_limit_nodes_and_to_each_once(
    ranks: dict[int, list[dict[str, Outcome]]], name: str, limit: int
) -> None:
    """Groups of experts are nodes. The rows between nodes are counted by hand, one for each token and node."""
    case = CASES[4][name]
    several = 0
    for rank, outcomes in enumerate(ranks[4]):
        nodes_T = []
        for ends in reached(case, rank):
            nodes_T.append({end // case.per_node for end in ends})
            several += len(ends) - len(nodes_T[-1])
        assert max(len(nodes) for nodes in nodes_T) <= limit
        remote = sum(len(nodes - {rank // case.per_node}) for nodes in nodes_T)
        assert int(outcomes[name].tallies["remote_nodes"]) == remote <= limit * len(nodes_T)
        (between, *_) = [sent for sent in outcomes[name].sent if sent.rows]
        rows = [sum(node in nodes for nodes in nodes_T) for node in range(between.ranks)]
        assert between.counts == rows
    assert several or case.per_node == 1  # several experts of a token are on one node


@pytest.mark.parametrize("choices", [2, 0])
def test_until_it_is_bound_it_gives_the_bits_of_local_dispatch(choices: int) -> None:
    case = Case((9,), 1, drops=True, token_major=bool(choices))
    results = []
    for name in ("local", "all_to_all"):
        ffn = tiny.moe(tiny.build())
        if name == "all_to_all":
            ffn.dispatcher = unbound()
        x_TD = torch.ones(9, 32, dtype=torch.float64).cumsum(0).requires_grad_()
        routing = case.routing(0)
        x_AD, ends_E, state = ffn.dispatcher.start(x_TD, routing).wait()
        y_TD = ffn.dispatcher.start_combine(ffn.routed(x_AD, ends_E), state).wait()
        y_TD.square().sum().backward()
        assert ffn.dispatcher.tallies(state) == {}
        results.append((y_TD.detach(), ends_E, x_TD.grad, routing.gate_A.grad))
    for own, expected in zip(*results, strict=True):
        assert torch.equal(own, expected)


def unbound(experts: int = 8) -> AllToAllDispatcher:
    """A dispatcher that is not bound to ranks."""
    return AllToAllDispatcher(None, None, experts=experts)  # type: ignore[arg-type]


# ---- placements that cannot be


@pytest.mark.parametrize(
    ("placed", "per_node", "message"),
    [
        (((0, 1, 2, 2),), 1, "expert 2 must be in one place, and is on ranks 0 and 0"),
        (((0, 1, 3),), 1, "expert 2 must be in one place, and is on no rank"),
        (((0, 1, 2, 4),), 1, "rank 0 has expert 4, and the layer has 4"),
        (((0, 1), (2, 3)), 1, "2 ranks have experts, and the mesh has 1"),
        (((0, 1, 2, 3),), 0, "ranks_per_node must divide the 1 ranks of the experts, and 0"),
    ],
)
def test_placements_that_cannot_be_are_refused(placed: Any, per_node: int, message: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=message):
            unbound(4).bind(init_device_mesh("cpu", (1,)), Placement(placed, per_node))
    finally:
        dist.destroy_process_group()


def test_a_mesh_of_two_dimensions_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="must have one dimension, not 2"):
            unbound().bind(init_device_mesh("cpu", (1, 1)), Placement.even(8, 1, 1))
    finally:
        dist.destroy_process_group()


# ---- the whole model


def divide(model: LanguageModel, mesh: Any, per_node: int) -> None:
    """Leaves this rank its even share of every layer's experts."""
    for path in model.expert_layers():
        ffn = tiny.moe(model, path)
        placement = Placement.even(ffn.experts, mesh.size(), per_node)
        own = list(placement.experts_RS[mesh.get_local_rank()])
        ffn.dispatcher = unbound(ffn.experts)
        ffn.dispatcher.bind(mesh, placement)
        for layer in (ffn.routed.gate_up, ffn.routed.down):
            layer.weight = nn.Parameter(layer.weight.detach()[own].clone())


def sums_and_gradients(model: LanguageModel, given: SequenceContext) -> dict[str, Any]:
    """The sum of all terms, the loads, and all gradients."""
    seen = tiny.see(model, given)
    total = seen.summed()
    return {
        "sum": total.detach(),
        "loads": seen.loads,
        "gradients": tiny.backward(model, total),
    }


@pytest.fixture(scope="module")
def models() -> list[dict[str, Any]]:
    """The model with divided experts on four ranks of two nodes, with and without recomputation."""
    whole = tiny.context(6, 8)
    built = {name: tiny.build(*MODEL, *more) for name, more in PLANS.items()}

    def work(rank: int) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (4,))
        exchanges = Exchanges()
        given = tiny.part(whole, SEQUENCES[rank])
        found = {}
        phases = note_phases()
        for name, model in built.items():
            divide(model, mesh, 2)
            exchanges.sent.clear()
            exchanges.events.clear()
            note_shared(model, exchanges.events)
            found[name] = sums_and_gradients(model, given)
            found[name]["sent"] = list(exchanges.sent)
            found[name]["events"] = list(exchanges.events)
            found[name]["phases"] = sorted(phases)
            found[name]["groups"] = len(groups_of(model))
        return found

    return on_forked_ranks(work, 4)


PLANS = {"kept": (), "recomputed": (RECOMPUTE,)}


def note_phases() -> set[str]:
    """The names of the phases that are recorded for profiles from now on."""
    names = set()
    original = torch.profiler.record_function

    def noted(name: str) -> Any:
        names.add(name)
        return original(name)

    exchange.record_function = noted  # type: ignore[assignment,misc]
    dispatcher.record_function = noted  # type: ignore[assignment,misc]
    return names


def groups_of(model: LanguageModel) -> set[Any]:
    """The process groups of all layers."""
    groups = set()
    for path in model.expert_layers():
        layout = tiny.moe(model, path).dispatcher.layout
        groups |= {peers.group for peers in layout.exchanges}
    return groups


def note_shared(model: LanguageModel, events: list[str]) -> None:
    """Notes when the shared expert of the first layer computes."""

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        events.append("shared forward")
        output.register_hook(lambda _: events.append("shared backward"))

    tiny.moe(model).shared.register_forward_hook(note)


def test_a_model_on_four_ranks_gives_the_gradients_of_one_process(
    models: list[dict[str, Any]],
) -> None:
    """Ranks have two, one, no and three sequences; expert gradients are whole where the experts are."""
    model = tiny.build(*MODEL)
    expected = sums_and_gradients(model, tiny.context(6, 8))
    found = [rank["kept"] for rank in models]
    torch.testing.assert_close(sum(rank["sum"] for rank in found), expected["sum"])
    for path, load_E in expected["loads"].items():
        assert torch.equal(sum(rank["loads"][path] for rank in found), load_E)
    divided = dict(tiny.expert_weights(model))
    gradients = {}
    for name in expected["gradients"]:
        shares = [rank["gradients"][name] for rank in found]
        gradients[name] = torch.cat(shares) if name in divided else torch.stack(shares).sum(0)
    tiny.assert_close(gradients, expected["gradients"])


def test_P47_recomputation_exchanges_rows_again_but_neither_counts_nor_experts(
    models: list[dict[str, Any]],
) -> None:
    """The same bits; counts, and which experts rows go to, are exchanged as often as without recomputation."""
    for rank in models:
        kept, recomputed = rank["kept"], rank["recomputed"]
        assert torch.equal(kept["sum"], recomputed["sum"])
        tiny.assert_equal(recomputed["gradients"], kept["gradients"])
        integers = [[sent for sent in run["sent"] if not sent.rows] for run in (kept, recomputed)]
        assert integers[0] == integers[1]
        rows = [sum(sent.rows for sent in run["sent"]) for run in (kept, recomputed)]
        assert rows == [3 * (6 + 6), 3 * (6 + 6 + 6)]  # three layers, each with six exchanges


def test_the_shared_expert_computes_while_tokens_travel(models: list[dict[str, Any]]) -> None:
    """In the forward pass between the start and the end of the first exchange, and in the backward pass too."""
    for rank in models:
        events = rank["kept"]["events"]
        for phase in ("shared forward", "shared backward"):
            at = events.index(phase)
            assert events[at - 2 : at + 3] == ["launch", "launch", phase, "wait", "wait"]


def test_phases_have_names_and_layers_share_process_groups(models: list[dict[str, Any]]) -> None:
    for rank in models:
        assert rank["kept"]["phases"] == [
            "combine.between_nodes",
            "combine.inside_node",
            "dispatch.between_nodes",
            "dispatch.counts",
            "dispatch.inside_node",
        ]
        assert rank["kept"]["groups"] == 2
