"""Compiled models whose weights are divided over ranks: how many graphs there are, and that they serve every batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import core.numerics.grouped
from core.assemble import build, compile_parts, shard
from core.contracts.context import SequenceContext
from core.model.language_model import LanguageModel
from core.testing.forked_ranks import on_ranks

from . import tiny

pytestmark = pytest.mark.full
WARM = 2
STEPS = 6
LAYERS = 2
MOST_GRAPHS = 2
"""Graphs of one function before torch gives up: one, and one to spare."""

RECIPE = (
    "model.blocks.dense.count=0",
    f"model.blocks.moe.count={LAYERS}",
    "model.attention={name: mha, heads: 2}",
    "model.blocks.moe.ffn.balance=[{name: bias, rate: 0.001}]",
)
EXPERTS = "strategy={name: expert_parallel, expert_ranks: 2}"
FSDP = "strategy={name: fsdp, ranks: 2}"
RECOMPUTE = "recompute.blocks=[moe]"


class Graphs:
    """A backend that counts the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    def backend(self) -> Any:
        """The backend of `torch.compile`, in which autograd is traced as in the default one."""
        return aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)

    def _forward(self, graph: Any, _: Any) -> Any:
        self.forward += 1
        return graph

    def _backward(self, graph: Any, _: Any) -> Any:
        self.backward += 1
        return graph


def divided(*overrides: str, backend: Any) -> LanguageModel:
    """This rank's part of a compiled model; graphs of earlier tests in this process do not count."""
    torch._dynamo.reset()
    recipe = tiny.compose(*RECIPE, *overrides)
    strategy = recipe.strategy.component(recipe.strategy.config)
    dispatcher = getattr(strategy.config, "dispatcher", None)
    model = build(recipe, device="meta", dispatcher=dispatcher)
    mesh = strategy.make_mesh("cpu")
    shard(model, recipe.seed, lambda whole: strategy.parallelize(whole, mesh))
    compile_parts(model, sharded=True, backend=backend)
    return model


def loss(model: LanguageModel, given: SequenceContext) -> tuple[Tensor, list[int]]:
    """The sum of all terms, and the assignments that each expert of each layer gets."""
    losses = model(given)
    terms = [term for head in losses.heads.values() for term in head.terms.values()]
    loads: list[int] = []
    for record in losses.expert_records().values():
        assert record.load_E is not None
        loads += record.load_E.tolist()
    return torch.stack(terms).sum(), loads


@pytest.mark.parametrize("recompute", [False, True])
def test_one_graph_serves_every_number_of_received_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """Zeros are written outside of the product's operator, as in compiled graphs for GPUs."""
    monkeypatch.setattr(
        core.numerics.grouped, "_masks_outside", lambda _: torch.compiler.is_compiling()
    )
    more = (EXPERTS, RECOMPUTE) if recompute else (EXPERTS,)

    def work(rank: int) -> list[tuple[int, int, list[int]]]:
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        graphs = Graphs()
        model = divided(*more, backend=graphs.backend())
        found: list[tuple[int, int, list[int]]] = []
        for step in range(STEPS):
            total, loads = loss(model, tiny.context(seed=2 * step + rank))
            total.backward()  # type: ignore[no-untyped-call]
            found.append((graphs.forward, graphs.backward, loads))
        return found

    for found in on_ranks(work, tmp_path, world=2):
        assert len({tuple(loads) for _, _, loads in found}) == STEPS
        assert found[0][0] > LAYERS
        assert len({counts[:2] for counts in found[WARM - 1 :]}) == 1, found


def test_hooks_that_gather_weights_cut_no_graph(tmp_path: Path) -> None:
    """All blocks together have one graph, and the head has another one, as in a model that is not divided.

    With products in bf16 a block is two units, because its norms and its router are gathered in fp32.
    """

    def work(rank: int) -> tuple[int, int]:
        graphs = Graphs()
        model = divided(FSDP, "precision.name=bf16", RECOMPUTE, backend=graphs.backend())
        total, _ = loss(model, tiny.context(seed=rank))
        total.backward()  # type: ignore[no-untyped-call]
        return graphs.forward, graphs.backward

    assert on_ranks(work, tmp_path, world=2) == [(2, 2)] * 2
