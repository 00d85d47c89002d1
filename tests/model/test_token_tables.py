"""Fixed tables from token ids to experts: K different ones, copies without the data, and the layers that use them."""

import copy
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import routing_reference as reference
import torch
from torch import Tensor, nn

import core
from core.contracts.errors import UserError
from core.routing.token_table import balanced_table, random_table
from core.testing import bench
from plugins.hash_gated.router import HashGatedRouter
from plugins.hash_routing.router import HashRouter

from . import tiny

ROUTERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "hash": (HashRouter, {}),
    "hash_gated": (HashGatedRouter, {"top_k": 3}),
}
GATED = (
    f"{tiny.ROUTER}={{name: hash_gated, top_k: 3, map: balanced, scale: 1.5}}",
    f"{tiny.BALANCE}=[]",
)
V4_LAYER = "name: moe, experts: 8, expert_hidden: 12, swiglu_limit: 10"
HASHED = f"{{{V4_LAYER}, router: {{name: hash_gated, top_k: 2, scale: 1.5}}}}"
LEARNED = (
    f"{{{V4_LAYER}, router: {{name: deepseek_v3, top_k: 2, affinity: sqrt_softplus, scale: 1.5}},"
    " balance: [{name: bias, rate: 0.001}]}"
)
BOTH = (
    "model.blocks={dense: null, moe: null, "
    f"hashed: {{count: 2, ffn: {HASHED}}}, learned: {{count: 1, ffn: {LEARNED}}}}}",
)


def made(name: str, counts: Any = None, *, map: str = "balanced") -> Any:
    """A router of 8 experts in fp64, built over data with these counts."""
    cls, keys = ROUTERS[name]
    build = bench.build_context(bench.KitPrecision(torch.float64))
    router = cls(cls.Config(map=map, **keys), replace(build, token_counts=counts), experts=8)
    router.reset_parameters()
    return router


def routed(router: Any) -> Tensor:
    context = bench.tokens()
    x_TD = bench.states(context).flatten(0, 1)
    result: Tensor = router(x_TD, lambda scores_TE: scores_TE, context).expert_A
    return result


class Data:
    """Token counts of data that can be neither copied nor pickled."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> Tensor:
        self.asked += 1
        return torch.arange(bench.VOCABULARY) ** 2 % 37

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the data were copied")

    def __reduce__(self) -> Any:
        raise AssertionError("the data were pickled")


# ---- tables


@pytest.mark.parametrize(("top_k", "experts"), [(1, 8), (2, 8), (6, 7), (5, 5)])
def test_every_id_has_different_experts_and_every_expert_an_even_part(
    top_k: int, experts: int
) -> None:
    """Each expert has its part of 20,000 ids in each place of the row within 4.5 standard deviations."""
    table_VK = random_table(0, 3, 20_000, top_k, experts)
    assert (table_VK.shape, table_VK.dtype) == ((20_000, top_k), torch.int64)
    assert 0 <= int(table_VK.min()) <= int(table_VK.max()) < experts
    assert all(len(set(row)) == top_k for row in table_VK.tolist())
    share = 1 / experts
    spread = 4.5 * (20_000 * share * (1 - share)) ** 0.5
    for column_V in table_VK.T:
        assert (column_V.bincount(minlength=experts) - 20_000 * share).abs().max() <= spread


def test_pairs_of_experts_are_drawn_evenly() -> None:
    """All 56 ordered pairs of 8 experts are equally likely: chi-squared over 55 degrees of freedom below 100."""
    rows = Counter(map(tuple, random_table(1, 0, 56_000, 2, 8).tolist()))
    assert len(rows) == 56
    assert sum((count - 1000) ** 2 / 1000 for count in rows.values()) < 100


def test_a_table_follows_seed_and_layer_and_each_row_its_id_alone() -> None:
    table_VK = random_table(0, 1, 500, 4, 8)
    assert torch.equal(random_table(0, 1, 60, 4, 8), table_VK[:60])
    assert torch.equal(random_table(0, 1, 500, 2, 8), table_VK[:, :2])
    for other in (random_table(1, 1, 500, 4, 8), random_table(0, 2, 500, 4, 8)):
        assert not torch.equal(other, table_VK)


COUNTS = [[7] * 5, [0] * 20, [1000 // (i + 1) for i in range(200)], [1] * 9 + [50]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_balanced_table_is_the_references(counts: list[int], top_k: int) -> None:
    assert balanced_table(counts, top_k, 8) == reference.balanced_table(counts, 8, top_k)


def test_the_balanced_table_spreads_the_text_evenly() -> None:
    """No two experts differ by more than the most frequent id."""
    counts = COUNTS[2]
    text = [0] * 8
    for count, row in zip(counts, balanced_table(counts, 3, 8), strict=True):
        for expert in row:
            text[expert] += count
    assert sum(text) == 3 * sum(counts)
    assert max(text) - min(text) <= max(counts)


# ---- modules that hold one


@pytest.mark.parametrize("name", ROUTERS)
def test_a_copy_takes_no_data_along(name: str) -> None:
    """A deep copy can still be reset from the run's data; a pickled module has its table and no data."""
    data = Data()
    router = made(name, data)
    copied = copy.deepcopy(router)
    assert torch.equal(routed(copied), routed(router))
    copied.table.fill_(0)
    assert not torch.equal(copied.table, router.table)
    copied.reset_parameters()
    assert torch.equal(copied.table, router.table)
    assert data.asked == 2
    sent = pickle.loads(pickle.dumps(router))
    assert torch.equal(routed(sent), routed(router))
    assert sent.token_counts() is None


@pytest.mark.parametrize("name", ROUTERS)
def test_a_pickled_module_can_be_reset_only_to_a_drawn_table(name: str) -> None:
    drawn = made(name, map="random")
    again = pickle.loads(pickle.dumps(drawn))
    again.table.zero_()
    again.reset_parameters()
    assert torch.equal(again.table, drawn.table)
    sent = pickle.loads(pickle.dumps(made(name, Data())))
    sent.reset_parameters()
    with pytest.raises(UserError, match="built without data"):
        routed(sent)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_table_whose_numbers_are_written_in_any_way_is_known(name: str) -> None:
    """A state dict, and a copy into the buffer, as sharded checkpoints are read; without either it is refused."""
    donor = made(name, Data())
    for load in (
        lambda one: one.load_state_dict(donor.state_dict()),
        lambda one: one.state_dict()["table"].copy_(donor.table),
    ):
        router = made(name)
        with pytest.raises(UserError, match=r"map = balanced .* built without data"):
            routed(router)
        load(router)
        assert torch.equal(routed(router), routed(donor))


def test_a_model_with_gated_tables_is_averaged_and_pickled() -> None:
    """What `torch.optim.swa_utils` and an EMA do with a whole model."""
    model = core.build(tiny.compose(*GATED), token_counts=lambda: torch.arange(tiny.VOCABULARY))
    tokens_BL = tiny.context().tokens_BL
    expected = model.logits(tokens_BL)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.logits(tokens_BL), expected)
    again: Any = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.logits(tokens_BL), expected)


# ---- the gated router


def test_a_bias_or_a_state_chooses_nothing_and_the_state_makes_the_gates() -> None:
    router = made("hash_gated", map="random")
    context = bench.tokens()
    first, second = (
        router(bench.states(context, seed=seed).flatten(0, 1), lambda s_TE: s_TE + 1e3, context)
        for seed in (0, 1)
    )
    assert torch.equal(first.expert_A, second.expert_A)
    assert not torch.equal(first.gate_A, second.gate_A)
    rows_TK = router.table[context.tokens_BL.flatten()]
    assert torch.equal(first.expert_A.view(-1, 3), rows_TK)
    torch.testing.assert_close(first.gate_A.view(-1, 3).sum(dim=1), torch.ones(24).double())


def test_decoding_has_the_experts_and_gates_of_the_forward() -> None:
    router = made("hash_gated", map="random")
    context = bench.tokens()
    x_TD = bench.states(context).flatten(0, 1)
    routing = router(x_TD, lambda s_TE: s_TE, context)
    expert_TK, gate_TK = router.choices(x_TD, lambda s_TE: s_TE, context)
    assert torch.equal(expert_TK.flatten(), routing.expert_A)
    assert torch.equal(gate_TK.flatten(), routing.gate_A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router.choices(x_TD, lambda s_TE: s_TE, context) is None


def test_the_first_layers_are_hashed_and_the_rest_learn() -> None:
    """Blocks by name choose their router; each hashed layer has its own table, and all of them learn their gates."""
    model = tiny.build(*BOTH).train()
    routers = [layer.router for layer in model.expert_layers().values()]
    assert [type(router).__name__ for router in routers] == [
        "HashGatedRouter",
        "HashGatedRouter",
        "DeepSeekV3Router",
    ]
    assert not torch.equal(routers[0].table, routers[1].table)
    tiny.see(model, tiny.context()).total().backward()
    for router in routers:
        assert router.centroids.weight.grad.abs().max() > 0


def test_a_multi_token_module_looks_up_the_token_whose_embedding_it_joins() -> None:
    """The experts of depth k are those of the token k + 1 places on."""
    gated = (f"{tiny.ROUTER}={{name: hash_gated, top_k: 2}}", f"{tiny.BALANCE}=[]")
    model = tiny.build(*gated, *tiny.MTP).eval()
    context = tiny.context(1, 6)
    seen: list[tuple[Tensor, Tensor]] = []
    heads: Any = model.heads
    for depth in heads.mtp.depths:
        router = depth.block.ffn.router
        hook: Any = lambda module, inputs, routing: seen.append((module.table, routing.expert_A))  # noqa: E731
        router.register_forward_hook(hook)
    with torch.no_grad():
        model(context)
    tokens_M = [*context.tokens_BL[0].tolist(), int(context.targets_BL[0, -1])]  # type: ignore[index]
    assert len(seen) == 2
    for depth, (table_VK, expert_A) in enumerate(seen, start=1):
        expected = [
            table_VK[token].tolist() for token in tokens_M[depth : depth + len(expert_A) // 2]
        ]
        found = expert_A.view(-1, 2).tolist()
        within = 6 - depth
        assert found[:within] == expected[:within]


def test_recomputation_changes_no_bit() -> None:
    found = []
    for more in ((), ("recompute.blocks=[hashed, learned]",)):
        model = tiny.build(*BOTH, *more).train()
        tiny.see(model, tiny.context(valid_BL=torch.ones(2, 8).tril(2).bool())).total().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ("top_k: 9", "must be between 1 and experts = 8"),
        ("top_k: 0", "must be between 1 and experts = 8"),
        ("top_k: 1", "must be at least 2: one gate, normalised"),
        ("top_k: 2, scale: 0", "must be more than 0"),
        ("top_k: 2, scale: .inf", "must be finite"),
        ("top_k: 2, scale: .nan", "must be finite"),
        ("top_k: 2, affinity: relu", "sqrt_softplus"),
        ("top_k: 2, map: learned", "random"),
        ("top_k: 2, groups: 4", "no choice to limit"),
    ],
)
def test_settings_that_cannot_be_are_refused(keys: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        tiny.compose(
            f"{tiny.FFN}.router=null",
            f"{tiny.ROUTER}={{name: hash_gated, {keys}}}",
            f"{tiny.BALANCE}=[]",
        )


def test_the_router_has_centroids_and_a_table_in_its_state() -> None:
    router = made("hash_gated", map="random")
    assert {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()} == {
        "table": (bench.VOCABULARY, 3),
        "centroids.weight": (8, bench.WIDTH),
    }
    assert router.costs().active == 8 * bench.WIDTH
    assert isinstance(router, nn.Module)
