"""Replicas and places: the published example, bounds that always hold, and an exact search at small sizes."""

import random
from collections.abc import Iterator
from itertools import combinations

import pytest

from core.contracts.errors import UserError
from core.deployment.balancing import (
    Deployment,
    LayerPlacement,
    balanced_packing,
    place_layer,
    replicate,
)
from core.deployment.plan import plan_placement

EXAMPLE = {
    "first": [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    "second": [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
}


def drawn_weights(draw: random.Random, count: int) -> list[float]:
    """Weights of one of four kinds: even, with many ties, with heavy tails, mostly zero."""
    kind = draw.randrange(4)
    if kind == 0:
        return [draw.uniform(0.5, 1.5) for _ in range(count)]
    if kind == 1:
        return [float(draw.randint(0, 4)) for _ in range(count)]
    if kind == 2:
        return [draw.paretovariate(0.7) for _ in range(count)]
    return [draw.choice([0.0, 0.0, 0.0, 1.0, 7.0]) for _ in range(count)]


def packings(items: tuple[int, ...], packs: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to divide items over packs of equally many, which have no order."""
    if packs == 1:
        yield [items]
        return
    size = len(items) // packs
    first, *rest = items
    for others in combinations(rest, size - 1):
        pack = (first, *others)
        left = tuple(item for item in items if item not in pack)
        for more in packings(left, packs - 1):
            yield [pack, *more]


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum of positive ones."""
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def test_the_published_example_is_reproduced_to_the_number() -> None:
    plan = plan_placement(EXAMPLE, gpus=8, nodes=2, replicas=16, groups=4).to_dict()
    assert plan["phy2log"] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert plan["logcnt"] == [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
    ]
    # by hand, from the positions of experts 5 and 1 of the first layer
    assert sorted(plan["log2phy"][0][5]) == [0, 2]
    assert sorted(plan["log2phy"][0][1]) == [13, 15]
    assert plan["log2phy"][0][0] == [12, -1]
    for phy2log, log2phy in zip(plan["phy2log"], plan["log2phy"], strict=True):
        for expert, row in enumerate(log2phy):
            assert sorted(p for p in row if p >= 0) == [
                p for p, logical in enumerate(phy2log) if logical == expert
            ]


def test_packing_never_exceeds_the_bound_of_a_greedy_choice() -> None:
    draw = random.Random(1)
    for _ in range(400):
        packs = draw.randint(1, 7)
        size = draw.randint(1, 6)
        weights = drawn_weights(draw, packs * size)
        packed = balanced_packing(weights, packs)
        assert sorted(item for pack in packed for item in pack) == list(range(packs * size))
        assert {len(pack) for pack in packed} == {size}
        loads = [sum(weights[item] for item in pack) for pack in packed]
        largest = max(weights)
        mean = sum(weights) / packs
        assert max(loads) <= mean + (1 - 1 / packs) * largest + 1e-9 * largest
        assert max(loads) - min(loads) <= largest * (1 + 1e-9)


def test_packing_stays_close_to_the_best_of_all_packings() -> None:
    draw = random.Random(2)
    ratios = []
    for _ in range(80):
        packs, size = draw.choice([(2, 2), (2, 3), (3, 2), (2, 4), (3, 3), (4, 2)])
        weights = drawn_weights(draw, packs * size)
        loads = [sum(weights[item] for item in p) for p in balanced_packing(weights, packs)]
        best = min(
            max(sum(weights[item] for item in pack) for pack in packing)
            for packing in packings(tuple(range(packs * size)), packs)
        )
        assert max(loads) >= best - 1e-9
        assert max(loads) <= (2 - 1 / packs) * best + 1e-9
        if best:
            ratios.append(max(loads) / best)
    assert max(ratios) < 1.34
    assert sum(ratios) / len(ratios) < 1.03


def test_no_other_choice_of_replicas_has_a_smaller_largest_copy() -> None:
    draw = random.Random(3)
    for _ in range(80):
        experts = draw.randint(1, 5)
        replicas = experts + draw.randint(0, 5)
        weights = drawn_weights(draw, experts)
        counts = [0] * experts
        for expert, copy in replicate(weights, replicas):
            assert copy == counts[expert]
            counts[expert] += 1
        found = max(w / c for w, c in zip(weights, counts, strict=True))
        best = min(
            max(w / c for w, c in zip(weights, counts, strict=True))
            for counts in compositions(replicas, experts)
        )
        assert found == pytest.approx(best, abs=1e-12)


def test_replicas_of_experts_without_any_load_are_spread() -> None:
    made = replicate([0.0, 0.0, 5.0], 7)
    assert [expert for expert, _ in made[3:]] == [2, 2, 2, 2]
    assert [expert for expert, _ in replicate([0.0, 0.0], 6)] == [0, 1, 0, 1, 0, 1]


def drawn_deployment(draw: random.Random) -> tuple[Deployment, int]:
    """Sizes that are possible, and a number of experts."""
    nodes = draw.choice([1, 2, 3])
    gpus = nodes * draw.randint(1, 4)
    groups = draw.choice([1, 2, 3, 4, 6])
    experts = groups * draw.randint(1, 6)
    replicas = gpus * (-(-experts // gpus) + draw.randint(0, 3))
    return Deployment(gpus, nodes, replicas, groups), experts


def test_every_expert_has_a_place_and_every_gpu_equally_many() -> None:
    draw = random.Random(4)
    for _ in range(250):
        deployment, experts = drawn_deployment(draw)
        weights = drawn_weights(draw, experts)
        placed = place_layer(weights, deployment)
        assert len(placed.expert_P) == deployment.slots * deployment.gpus == deployment.replicas
        assert set(placed.expert_P) == set(range(experts))
        counts = placed.counts
        assert sum(counts) == deployment.replicas
        for expert, physical in enumerate(placed.physical_experts):
            assert [placed.expert_P[p] for p in physical] == [expert] * counts[expert]
        load_G = placed.load_of_gpus(weights, deployment.gpus)
        assert sum(load_G) == pytest.approx(sum(weights))
        if not deployment.is_hierarchical or deployment.nodes == 1:
            copy = max(w / c for w, c in zip(weights, counts, strict=True))
            mean = sum(weights) / deployment.gpus
            assert max(load_G) <= mean + (1 - 1 / deployment.gpus) * copy + 1e-9 * (1 + copy)


def test_a_hierarchical_plan_leaves_groups_whole_on_a_node() -> None:
    draw = random.Random(5)
    hierarchical = 0
    for _ in range(150):
        deployment, experts = drawn_deployment(draw)
        if not deployment.is_hierarchical:
            continue
        hierarchical += deployment.nodes > 1
        placed = place_layer(drawn_weights(draw, experts), deployment)
        of_node = deployment.replicas // deployment.nodes
        size = experts // deployment.groups
        nodes: dict[int, set[int]] = {}
        for physical, expert in enumerate(placed.expert_P):
            nodes.setdefault(expert // size, set()).add(physical // of_node)
        assert all(len(reached) == 1 for reached in nodes.values())
        held = [
            sum(node in reached for reached in nodes.values()) for node in range(deployment.nodes)
        ]
        assert set(held) == {deployment.groups // deployment.nodes}
    assert hierarchical > 10


def test_a_plan_is_close_to_the_best_of_all_plans() -> None:
    draw = random.Random(6)
    ratios = []
    for _ in range(10):
        experts, gpus, slots = draw.choice([(2, 2, 2), (3, 2, 2), (3, 3, 2)])
        weights = [draw.uniform(1, 10) for _ in range(experts)]
        best = float("inf")
        for counts in compositions(gpus * slots, experts):
            copies = [weights[e] / c for e, c in enumerate(counts) for _ in range(c)]
            for packing in packings(tuple(range(gpus * slots)), gpus):
                best = min(best, max(sum(copies[i] for i in pack) for pack in packing))
        placed = place_layer(weights, Deployment(gpus, 1, gpus * slots))
        ratios.append(max(placed.load_of_gpus(weights, gpus)) / best)
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) < 1.34


def test_even_loads_stay_as_they_are_if_experts_fill_the_gpus() -> None:
    placed = place_layer([1.0] * 8, Deployment(8, 1, 8))
    assert placed == LayerPlacement(tuple(range(8)), (0,) * 8, 8)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (Deployment(0, 1, 8), "gpus = 0: must be at least 1"),
        (Deployment(4, 3, 12), "gpus = 4: must be a multiple of nodes = 3"),
        (Deployment(4, 2, 10), "replicas = 10: must be a multiple of gpus = 4"),
        (Deployment(4, 2, 4), "replicas = 4: must be at least the 8 experts"),
        (Deployment(4, 1, 8, 3), "groups = 3: must divide the 8 experts"),
    ],
)
def test_impossible_sizes_are_one_sentence(sizes: Deployment, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        place_layer([1.0] * 8, sizes)


@pytest.mark.parametrize("load", [float("nan"), float("inf"), -1.0])
def test_loads_that_are_no_numbers_from_0_are_one_sentence(load: float) -> None:
    with pytest.raises(UserError, match=f"the load of expert 2 is {load}: must be a number from 0"):
        plan_placement({"a": [1.0, 2.0, load, 4.0]}, gpus=2)
