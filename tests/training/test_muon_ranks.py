"""Muon on divided weights: the updates of one process, whole matrices gathered only where they are divided, resumes."""

import tempfile
from pathlib import Path

import pytest
import torch
from exact_cases import STRATEGIES, Case
from lab import Lab, last_checkpoint
from rank_runs import assert_same_end, cut_after, fit_on_ranks
from test_exact_ranks import check

from core.assemble import build, make
from core.testing.forked_ranks import on_ranks
from core.training.local_parameters import LocalParameters

FP64 = "precision.name=fp64"
MUON = "optimizer={name: muon, lr: 0.01}"
RANKS = {
    "fsdp": "strategy={name: fsdp, ranks: 2}",
    "experts": "strategy={name: expert_parallel, expert_ranks: 2}",
}


def test_two_ranks_with_divided_weights_are_exact(lab: Lab) -> None:
    """Losses, weights and momentum after every step, to 1e-9 of one process."""
    check(lab, 2, [Case("experts", 2, (MUON,))])


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_strategy_is_exact(lab: Lab, world: int) -> None:
    needs_four = ("experts of two nodes", "experts and data")
    names = [name for name in STRATEGIES if world == 4 or name not in needs_four]
    check(lab, world, [Case(name, 1, (MUON,)) for name in names])


FULL = pytest.mark.full
LAYOUTS = [
    pytest.param("{name: expert_parallel, expert_ranks: 2}", 8, id="experts"),
    pytest.param("{name: expert_parallel, expert_ranks: 2, ranks: 4}", 8, id="data", marks=FULL),
    pytest.param("{name: fsdp, ranks: 4}", 8, id="fsdp", marks=FULL),
    pytest.param("{name: fsdp, ranks: 4}", 6, id="fsdp, uneven", marks=FULL),
]


@pytest.mark.parametrize(("strategy", "experts"), LAYOUTS)
def test_only_matrices_that_are_divided_are_gathered(lab: Lab, strategy: str, experts: int) -> None:
    """A stack whose experts are on one rank each is whole; its rows are divided where ranks cannot share experts."""
    recipe = lab.recipe(
        f"strategy={strategy}",
        f"model.blocks.moe.ffn.experts={experts}",
        "model.blocks.moe.ffn.router.groups=1",
        "model.blocks.moe.ffn.router.group_limit=1",
    )
    factory = make(recipe.strategy)

    def gathered(rank: int) -> dict[str, set[bool]]:
        mesh = factory.make_mesh("cpu")
        dispatcher = getattr(factory.config, "dispatcher", None)
        model = build(recipe, device="meta", dispatcher=dispatcher)
        factory.parallelize(model, mesh)
        found: dict[str, set[bool]] = {}
        for named in LocalParameters(model.to_empty(device="cpu")).named:
            found.setdefault(named.kind, set()).add(named.shard is not None)
            if named.shard is not None:
                whole = named.shard.gather(torch.zeros_like(named.parameter))
                assert named.shard.shard_of(whole).shape == named.parameter.shape
        return found

    ranks = factory.ranks_of(factory.config)
    with tempfile.TemporaryDirectory() as folder:
        by_rank = on_ranks(gathered, Path(folder), world=ranks)
    for found in by_rank:
        assert found["matrix"] == {True}
        assert found["stack"] == {experts == 6}


@pytest.mark.full
@pytest.mark.parametrize("layout", RANKS)
def test_a_sharded_run_resumes_to_the_bit_and_on_one_process(
    lab: Lab, tmp_path: Path, layout: str
) -> None:
    whole, same, alone = tmp_path / "whole", tmp_path / "same", tmp_path / "alone"
    common = (FP64, MUON, "checkpoint.keep=9", "checkpoint.every_steps=5")
    fit_on_ranks(lab, whole, *common, RANKS[layout])
    cut_after(whole, 5, same)
    cut_after(whole, 5, alone)
    fit_on_ranks(lab, same, *common, RANKS[layout], resume=True)
    first, second = last_checkpoint(whole), last_checkpoint(same)
    for name, weight in first["state_dict"].items():
        assert torch.equal(weight, second["state_dict"][name]), name
    for one, other in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        for index, state in one["state"].items():
            for key, value in state.items():
                assert torch.equal(value, other["state"][index][key]), (index, key)
    lab.fit(alone, *common, resume=True)
    assert_same_end(alone, whole)
