"""The exchange of tokens on paper: against every choice there is, against drawn ones, and DeepSeek's own numbers."""

import json
from itertools import combinations

import pytest
import torch
from lab import Lab

from core.analysis.exchange import (
    Choice,
    CopyBytes,
    LayerExchange,
    decode_exchange_seconds,
    decode_token_seconds,
    exchange_of,
)
from core.contracts.errors import UserError
from core.recipe.compose import compose
from core.routing.gating import best_experts

V3 = Choice(experts=256, top_k=8, groups=8, group_limit=4)
FREE = Choice(experts=256, top_k=8)


def counted(choice: Choice, parts: int) -> tuple[float, int]:
    """The mean and the largest number of parts with an expert, over every set of groups and experts that is allowed."""
    size = choice.experts // choice.groups
    found = []
    for groups in combinations(range(choice.groups), choice.group_limit):
        allowed = [group * size + place for group in groups for place in range(size)]
        for experts in combinations(allowed, choice.top_k):
            found.append(len({expert * parts // choice.experts for expert in experts}))
    return sum(found) / len(found), max(found)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "choice",
    [
        Choice(8, 3),
        Choice(8, 3, groups=4, group_limit=2),
        Choice(8, 2, groups=2, group_limit=1),
        Choice(8, 4, groups=8, group_limit=5),
        Choice(8, 8),
    ],
)
def test_a_token_reaches_as_many_parts_as_counting_finds(choice: Choice, parts: int) -> None:
    mean, most = counted(choice, parts)
    assert choice.touched(parts) == pytest.approx(mean, abs=1e-12)
    assert choice.most_touched(parts) == most


def test_drawn_tokens_reach_as_many_nodes_and_ranks() -> None:
    """Draws 20,000 tokens of DeepSeek-V3: four of eight nodes, then eight of their experts."""
    draw = torch.Generator().manual_seed(0)
    tokens = 20_000
    group_TG = torch.rand(tokens, 8, generator=draw).argsort(dim=1)[:, :4]
    place_TK = torch.rand(tokens, 4 * 32, generator=draw).argsort(dim=1)[:, :8]
    expert_TK = group_TG.gather(1, place_TK // 32) * 32 + place_TK % 32
    for parts in (8, 64):
        at_TP = torch.zeros(tokens, parts).scatter(1, expert_TK * parts // 256, 1.0)
        reached_T = at_TP.sum(dim=1)
        error = 4 * float(reached_T.std()) / tokens**0.5
        assert V3.touched(parts) == pytest.approx(float(reached_T.mean()), abs=error)
        assert reached_T.max() <= V3.most_touched(parts)
    # The token's own node is one of the eight, whichever; copies go to the others.
    at_TN = torch.zeros(tokens, 8).scatter(1, expert_TK // 32, 1.0)
    own_T = torch.randint(8, (tokens,), generator=draw)
    remote_T = at_TN.sum(dim=1) - at_TN[torch.arange(tokens), own_T]
    layer = LayerExchange.of(V3, expert_ranks=64, ranks_per_node=8)
    assert layer.copies_between == pytest.approx(float(remote_T.mean()), abs=0.02)


def test_published_numbers_of_nodes_and_copies() -> None:
    """Report 2.1.2 and arXiv 2505.09343, section 4.3: at most 4 of 8 nodes; 5.29 without the limit."""
    assert FREE.touched(8) == pytest.approx(5.29, abs=0.005)
    assert FREE.most_touched(8) == 8
    assert V3.most_touched(8) == 4
    assert V3.touched(8) < 4
    assert CopyBytes.of(7168) == CopyBytes(out=7168 + 56 * 4, scales=56 * 4, back=14_336)


def test_the_router_reaches_no_more_nodes_than_the_limit() -> None:
    scores_TE = torch.rand(500, 256, generator=torch.Generator().manual_seed(1))
    expert_TK = best_experts(scores_TE, top_k=8, groups=8, group_limit=4, experts_per_group_score=2)
    nodes = [len(set((row // 32).tolist())) for row in expert_TK]
    assert max(nodes) == V3.most_touched(8)


def test_published_times_of_decoding() -> None:
    """arXiv 2505.09343, section 2.3.2: 120.96 us an exchange and 14.76 ms a token; 0.82 ms over NVLink of a GB200."""
    exchange = decode_exchange_seconds()
    assert exchange == pytest.approx(120.96e-6, rel=1e-6)
    assert decode_token_seconds(exchange) == pytest.approx(14.76e-3, abs=5e-6)
    fast = decode_exchange_seconds(bytes_per_second=900e9)
    assert decode_token_seconds(fast) == pytest.approx(0.82e-3, abs=5e-6)
    assert decode_exchange_seconds(dim=7168) == pytest.approx(123.86e-6, abs=1e-8)


def test_deepseek_v3_on_eight_nodes() -> None:
    """59 layers with experts; 15,360 sequences of 4,096 tokens a step, forwards and backwards."""
    found = exchange_of(compose("dsv3_671b"), expert_ranks=64, ranks_per_node=8)
    assert (found["nodes"], len(found["layers"])) == (8, 59)
    layer = found["layers"]["blocks.3"]
    assert layer["nodes_unlimited"] == pytest.approx(5.29, abs=0.005)
    assert layer["most_nodes"] == 4
    copy = 7_392 + 14_336
    between = found["bytes_per_token"]["between_nodes"]
    assert between == pytest.approx(59 * V3.touched(8) * 7 / 8 * copy)
    assert between < 59 * 4 * copy
    inside = found["bytes_per_token"]["inside_nodes"]
    assert inside == pytest.approx(59 * V3.touched(64) * 7 / 8 * copy)
    assert found["tokens_per_step"] == 15_360 * 4_096
    assert found["bytes_per_step"]["between_nodes"] == pytest.approx(2 * 15_360 * 4_096 * between)


@pytest.mark.parametrize(
    ("ranks", "per_node", "sentence"),
    [
        (3, 3, "expert ranks = 3: must divide the 8 experts of blocks.1"),
        (8, 3, "ranks of a node = 3: must divide the 8 expert ranks"),
        (8, 0, "ranks of a node = 0: must divide the 8 expert ranks"),
    ],
)
def test_sizes_that_do_not_divide_are_reported(
    lab: Lab, ranks: int, per_node: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        exchange_of(lab.recipe(), ranks, per_node)


def test_describe_shows_the_exchange_of_a_layout(lab: Lab) -> None:
    layout = ("--layout", "data=4,expert=4")
    document = json.loads(lab.command("describe", lab.file, *layout, "--json").out)["exchange"]
    assert (document["nodes"], document["ranks_per_node"]) == (1, 4)
    assert document["bytes_per_token"]["between_nodes"] == 0
    two = lab.command("describe", lab.file, *layout, "--gpus-per-node", "2")
    assert "exchange of tokens between 4 expert ranks, 2 nodes of 2:" in two.out
    mean, most = counted(Choice(8, 2, groups=4, group_limit=2), 2)
    assert f"in 2 layers a token reaches {mean:.2f} of 2 nodes (at most {most})" in two.out
    assert json.loads(lab.command("describe", lab.file, "--json").out)["exchange"] is None
    wrong = lab.command("describe", lab.file, *layout, "--gpus-per-node", "3")
    assert (wrong.code, wrong.sentence) == (
        2,
        "ranks of a node = 3: must divide the 4 expert ranks",
    )
