"""Initial weights that are sharded over ranks: the bits of one process, and no number drawn twice."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from tiers import first_by_default
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from core.assemble import build, make
from core.model.initialise import initialise
from core.numerics import draw
from core.numerics.draw import draw_normal
from core.numerics.linear import GroupedLinear
from core.recipe.compose import Recipe
from core.testing.forked_ranks import on_ranks
from core.training.weight_shards import weight_shards

CASES = {
    2: {
        "fsdp": "{name: fsdp, ranks: 2}",
        "expert_parallel": "{name: expert_parallel, expert_ranks: 2}",
    },
    4: {
        "fsdp": "{name: fsdp, ranks: 4}",
        "fsdp with parts of every matrix": "{name: fsdp, ranks: 4}",
        "expert_parallel 2 x 2": "{name: expert_parallel, expert_ranks: 2, ranks: 4}",
        "expert_parallel 2 x 2 with parts of every matrix": "{name: expert_parallel, expert_ranks: 2, ranks: 4}",
    },
}
ODD = ("model.blocks.moe.ffn.experts=6", "model.blocks.moe.ffn.router.groups=2")
"""Experts whose number the ranks of FSDP do not divide: each rank then has rows of every matrix."""


def recipe_of(lab: Lab, name: str, strategy: str) -> Recipe:
    """The tiny recipe under a strategy."""
    more = ODD if "every matrix" in name else ()
    return lab.recipe("precision.name=fp32", "batch.sequences=4", f"strategy={strategy}", *more)


@contextmanager
def counted() -> Iterator[list[int]]:
    """A context that gives a list of how many numbers each call of `normal_` has drawn."""
    drawn: list[int] = []
    original = Tensor.normal_

    def normal_(tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if not tensor.is_meta:
            drawn.append(tensor.numel())
        return original(tensor, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "normal_", normal_)
        yield drawn


def sharded(recipe: Recipe) -> tuple[int, dict[str, Tensor]]:
    """How many numbers this rank drew, and the whole weights that all ranks together have."""
    strategy = make(recipe.strategy)
    mesh = strategy.make_mesh("cpu")
    with counted() as drawn:
        model = build(
            recipe,
            parallelize=lambda model: strategy.parallelize(model, mesh),
            dispatcher=getattr(recipe.strategy.config, "dispatcher", None),
        )
    weights = {}
    for name, shard in weight_shards(model, strategy.expert_group(mesh)):
        part = shard.weight.detach()
        local = getattr(part, "to_local", lambda part=part: part)()
        weights[name] = shard.gather(local)
    return sum(drawn), weights


@pytest.mark.parametrize("world", first_by_default(CASES))
def test_ranks_draw_each_number_once_and_get_the_bits_of_one_process(lab: Lab, world: int) -> None:
    recipes = {name: recipe_of(lab, name, CASES[world][name]) for name in CASES[world]}

    def work(rank: int) -> dict[str, tuple[int, dict[str, Tensor]]]:
        return {name: sharded(recipe) for name, recipe in recipes.items()}

    with tempfile.TemporaryDirectory() as folder:
        by_rank = on_ranks(work, Path(folder), world=world)
    for name, recipe in recipes.items():
        with counted() as drawn:
            alone = build(recipe)
        matrices = sum(weight.numel() for weight in alone.parameters() if weight.ndim > 1)
        assert sum(drawn) == matrices
        drew = [found[name][0] for found in by_rank]
        assert sum(drew) == matrices, name
        assert max(drew) < 1.3 * matrices / world, f"{name}: {drew}"
        for found in by_rank:
            for weight, value in alone.named_parameters():
                assert torch.equal(found[name][1][weight], value), f"{name}: {weight}"


class Foreign(nn.Module):
    """A layer of a plugin that draws several tensors in a row, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(5, 3))
        self.second = nn.Parameter(torch.empty(7))
        self.noise: Tensor
        self.register_buffer("noise", torch.empty(3))

    def reset_parameters(self) -> None:
        """Draws two weights and a buffer from one generator."""
        draw_normal(self.first, 1.0)
        nn.init.uniform_(self.second)
        self.noise.copy_(torch.rand(3))


class OwnStack(GroupedLinear):
    """A stack that a plugin resets in a way of its own."""

    def reset_parameters(self) -> None:
        """Draws the whole stack from one generator."""
        nn.init.uniform_(self.weight)


def of_plugins() -> nn.Module:
    """A model of such layers, after some of the usual kind."""
    formats: Any = {"std": 1.0, "param_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    stacks = [GroupedLinear(3, 2, 8, **formats), OwnStack(2, 3, 4, **formats)]
    return nn.Sequential(*stacks, Foreign(), Foreign(), OwnStack(4, 2, 2, **formats))


def test_layers_of_plugins_may_draw_as_they_like() -> None:
    alone = of_plugins()
    initialise(alone, 3)

    def work(rank: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            model = of_plugins()
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[0], mesh=mesh, shard_placement_fn=lambda _: Shard(1))
        for module in model[1:]:
            fully_shard(module, mesh=mesh)
        model.to_empty(device="cpu")
        initialise(model, 3)
        found = {name: weight.full_tensor() for name, weight in model.named_parameters()}
        return found | dict(model.named_buffers())

    with tempfile.TemporaryDirectory() as folder:
        for found in on_ranks(work, Path(folder), world=2):
            assert found.keys() == alone.state_dict().keys()
            for name, value in alone.state_dict().items():
                assert torch.equal(found[name], value), name


def test_threads_draw_the_numbers_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(threaded: int, get_threads: Callable[[], int]) -> Tensor:
        monkeypatch.setattr(draw, "THREADED", threaded)
        monkeypatch.setattr(torch, "get_num_threads", get_threads)
        torch.manual_seed(4)
        stack = torch.empty(7, 5, 6)
        draw.draw_stack(stack, 1.0, first=2)
        return stack

    assert torch.equal(drawn(0, lambda: 3), drawn(0, lambda: 1))
