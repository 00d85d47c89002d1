"""Whole runs with token tables: on ranks, with sharded checkpoints, continued, averaged, used and refused."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_cases import RECOMPUTE, Case
from lab import Lab, assert_same, assert_same_run, last_checkpoint
from rank_runs import cut_after, fit_on_ranks
from test_exact_ranks import check
from test_sharded_runs import FP64, STRATEGIES, train
from torch import Tensor

from core.analysis.budget import plan_of
from core.checkpoints.index import is_sharded
from core.checkpoints.listing import checkpoints_in
from core.routing.token_table import balanced_table
from core.run.data import text_data
from core.run.loading import load

FFN = "model.blocks.moe.ffn"
ROUTERS = {
    "hash": (f"{FFN}.router={{name: hash, map: balanced}}", f"{FFN}.balance=[]"),
    "hash_gated": (
        f"{FFN}.router={{name: hash_gated, top_k: 2, map: balanced, scale: 1.5}}",
        f"{FFN}.balance=[]",
        f"{FFN}.swiglu_limit=0.5",
    ),
}
"""Routers with a table that is balanced on the training text."""

SHORT = ("budget.steps=4", "checkpoint.every_steps=2", "validation.every_steps=null")
CASES = [(router, layout) for router in ROUTERS for layout in ("fsdp 2", "experts 2")]


def table_of(lab: Lab, top_k: int) -> Tensor:
    """The table that the training text of the small recipe gives."""
    recipe = lab.recipe()
    counts = text_data(recipe, plan_of(recipe)).token_counts().tolist()
    return torch.tensor(balanced_table(counts, top_k, 8))


def routers_of(model: Any) -> list[Any]:
    return [layer.router for layer in model.expert_layers().values()]


@pytest.mark.parametrize(("router", "layout"), CASES)
def test_a_balanced_table_is_read_from_a_sharded_checkpoint(
    lab: Lab, tmp_path: Path, router: str, layout: str
) -> None:
    """By `load`, by a run that starts from it, whole or divided, and by the commands."""
    keys = (*ROUTERS[router], *SHORT)
    ranks, strategy = STRATEGIES[layout]
    run = tmp_path / "run"
    fit_on_ranks(lab, run, FP64, strategy, *keys, ranks=ranks)
    assert is_sharded(checkpoints_in(run)[-1])
    model = load(run)
    expected = table_of(lab, routers_of(model)[0].top_k)
    for one in routers_of(model):
        assert torch.equal(one.table.view_as(expected), expected)
    tokens_BL = torch.arange(12)[None]
    with torch.no_grad():
        logits_BLV = model.logits(tokens_BL)
        assert torch.equal(deepcopy(model).logits(tokens_BL), logits_BLV)
    assert lab.command("evaluate", run).code == 0
    written = lab.command("generate", run, "--prompt", "ab", "--tokens", "4")
    assert written.code == 0, written.err
    start = f"initial_weights={run}"
    alone = tmp_path / "alone"
    lab.fit(alone, FP64, *keys, start)
    divided = tmp_path / "divided"
    fit_on_ranks(lab, divided, FP64, strategy, *keys, start, ranks=ranks)
    for other in (alone, divided):
        found = last_checkpoint(other)["state_dict"]
        tables = [value for name, value in found.items() if name.endswith("router.table")]
        assert len(tables) == 2
        for table in tables:
            assert torch.equal(table.view_as(expected), expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_model_loaded_from_a_sharded_checkpoint_can_be_compiled(
    lab: Lab, tmp_path: Path, router: str
) -> None:
    """The table is looked at once, outside of the graph."""
    run = tmp_path / "run"
    ranks, strategy = STRATEGIES["fsdp 2"]
    fit_on_ranks(lab, run, FP64, strategy, *ROUTERS[router], *SHORT, ranks=ranks)
    model = load(run)
    tokens_BL = torch.arange(12)[None]
    with torch.no_grad():
        expected = deepcopy(model).logits(tokens_BL)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        torch.testing.assert_close(model.logits(tokens_BL), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("router", "layout"), [("hash_gated", "one"), ("hash_gated", "experts 2"), ("hash", "fsdp 2")]
)
def test_a_run_continues_to_the_same_bits(
    lab: Lab, tmp_path: Path, router: str, layout: str
) -> None:
    whole = train(lab, tmp_path / "whole", layout, *ROUTERS[router])
    cut = cut_after(whole, 5, tmp_path / "cut")
    assert_same_run(train(lab, cut, layout, *ROUTERS[router], resume=True), whole)


@pytest.mark.parametrize("strategy", ["experts", "fsdp", "ddp"])
def test_ranks_compute_what_one_process_computes(lab: Lab, strategy: str) -> None:
    """With padding, accumulation, recomputation, a multi-token module and a clamped SwiGLU."""
    gated = ROUTERS["hash_gated"]
    drawn = (gated[0].replace("balanced", "random"), *gated[1:])
    learned = (
        f"{FFN}.router={{name: deepseek_v3, top_k: 2, affinity: sqrt_softplus, scale: 1.5}}",
        f"{FFN}.swiglu_limit=0.5",
    )
    check(lab, 2, [Case(strategy, 2, (RECOMPUTE, *drawn)), Case(strategy, 2, learned)])


def test_a_run_with_tables_cannot_be_exported_and_the_sentence_says_why(
    lab: Lab, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    quick = ("budget.steps=1", "validation.every_steps=null", "model.heads.mtp=null")
    lab.fit(run, *ROUTERS["hash_gated"][:2], *quick)
    result = lab.command("convert", "to-hf", run, tmp_path / "out")
    assert result.code == 2
    assert "the router must be deepseek_v3, not hash_gated" in result.sentence
    assert not (tmp_path / "out").exists()


def test_a_run_is_the_same_however_its_batches_are_split(lab: Lab, tmp_path: Path) -> None:
    """A balanced table, learned gates and clamped experts, trained in one micro-batch or in four."""
    runs = []
    for sequences, accumulate in ((8, 1), (2, 4)):
        run = tmp_path / str(accumulate)
        batch = f"batch={{sequences: {sequences}, accumulate: {accumulate}}}"
        quick = ("budget.steps=2", "validation.every_steps=null")
        lab.fit(run, FP64, *ROUTERS["hash_gated"], *quick, batch)
        runs.append(last_checkpoint(run)["state_dict"])
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-9, atol=1e-9)
    assert_same(
        {name: value for name, value in runs[0].items() if name.endswith("table")},
        {name: value for name, value in runs[1].items() if name.endswith("table")},
    )
