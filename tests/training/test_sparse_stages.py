"""Runs with sparse attention: the warm-up of the indexers, its end, resuming across it, and several ranks."""

import shutil
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from exact_cases import RECOMPUTE, Case, compare
from lab import Lab, assert_same_run, last_checkpoint, rows
from rank_runs import assert_same_end, cut_after, fit_on_ranks
from test_window import cut, padded
from tiers import first_by_default
from torch import Tensor

import core.run.loading
import core.run.run_model
from core.assemble import build, compile_parts
from core.contracts.errors import UserError
from core.run.loading import added_to
from core.testing.forked_ranks import on_ranks
from core.training.launchers import Launch

SPARSE = (
    "model.attention={name: sparse, heads: 2, q_rank: 16, kv_rank: 16, nope_dim: 8, rope_dim: 4, value_dim: 8, "
    "index_heads: 3, index_dim: 8, top_k: 5}",
)
WARMUP = (*SPARSE, "model.attention.warmup_steps=2")
TRAINED = (*WARMUP, "model.attention.warmup_main=trained")


class States(L.Callback):
    """Copies weights and buffers before the first step and after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.values: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._copy(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._copy(pl_module)
        self.values.append(dict(pl_module.step_values))

    def _copy(self, pl_module: Any) -> None:
        state = pl_module.model.state_dict()
        self.steps.append({name: tensor.clone() for name, tensor in state.items()})

    def changed(self, step: int) -> set[str]:
        """The names of what a step, counted from 1, has changed."""
        before, after = self.steps[step - 1], self.steps[step]
        return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def windows(steps: int) -> list[Any]:
    """Windows of two micro-batches."""
    return [cut(padded([16, 3, 9, 12], seed), [2, 2]) for seed in range(steps)]


def test_in_the_warm_up_of_a_frozen_model_nothing_but_the_indexers_changes(lab: Lab) -> None:
    """Two steps, whose weights, moments and selection biases stay; with the third everything learns."""
    states = States()
    module = lab.train(*WARMUP, "precision.name=fp64", windows=windows(3), callbacks=[states])
    indexers = {name for name in states.steps[0] if ".indexer." in name}
    weights = {name for name, _ in module.model.named_parameters()}
    biases = {name for name in states.steps[0] if name.endswith("balance.0.bias")}
    stages = {name for name in states.steps[0] if name.endswith("attention.dense")}
    assert states.changed(1) == states.changed(2) == indexers
    assert states.changed(3) == weights | biases | stages
    optimizer = module.optimizers()
    steps = {
        named.name: float(optimizer.state[named.parameter]["step"])  # type: ignore[union-attr]
        for named in module.local_parameters.named
    }
    assert steps == {name: 3.0 if name in indexers else 1.0 for name in weights}
    assert [values["skipped_steps"] for values in states.values] == [0, 0, 0]


def test_a_step_of_a_trained_model_in_the_warm_up_changes_everything(lab: Lab) -> None:
    states = States()
    module = lab.train(*TRAINED, windows=windows(1), callbacks=[states])
    weights = {name for name, _ in module.model.named_parameters()}
    assert states.changed(1) >= weights


def test_skipped_steps_do_not_prolong_the_warm_up(lab: Lab) -> None:
    """The gradients of the first two steps are not finite."""
    states = States()

    def break_two_steps(model: Any) -> None:
        weight = model.blocks[0].attention.indexer.k.weight
        calls = []

        def broken(gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient * torch.inf if len(calls) <= 4 else gradient

        weight.register_hook(broken)

    lab.train(*WARMUP, windows=windows(3), callbacks=[states], model=break_two_steps)
    assert not states.changed(1)
    assert "embedding.weight" in states.changed(3)
    assert not states.steps[3]["blocks.0.attention.dense"]


SHORT = (
    "budget.steps=4",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
    "validation.every_steps=4",
)


@pytest.mark.parametrize("warmup", first_by_default([3, 2]))
def test_a_run_resumes_to_the_bit_across_the_end_of_the_warm_up(
    lab: Lab, tmp_path: Path, warmup: int
) -> None:
    """It is cut after step 2: in the middle of the warm-up, and at its end."""
    keys = (*WARMUP, f"model.attention.warmup_steps={warmup}", *SHORT)
    lab.fit(tmp_path / "whole", *keys)
    cut_run = cut_after(tmp_path / "whole", 2, tmp_path / "cut")
    lab.fit(cut_run, *keys, resume=True)
    assert_same_run(cut_run, tmp_path / "whole")
    names = rows(cut_run)[0]
    assert {"loss/attention/indexer", "attention/selected_share"} <= names.keys(), sorted(names)


def test_a_run_starts_from_weights_of_latent_attention_and_draws_its_indexers(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    """As DeepSeek-V3.2 did; in the warm-up the weights stay what they were. A part of an indexer is an error."""
    start = f"initial_weights={finished}"
    lab.fit(tmp_path / "warm", *WARMUP, start, "budget.steps=1", "validation.every_steps=1")
    before = last_checkpoint(finished)["state_dict"]
    after = last_checkpoint(tmp_path / "warm")["state_dict"]
    added = after.keys() - before.keys()
    assert {name.split(".attention.")[1].split(".")[0] for name in added} == {"indexer", "dense"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    sparse = tmp_path / "sparse"
    lab.fit(sparse, *SPARSE, f"initial_weights={tmp_path / 'warm'}", "budget.steps=1")
    assert "model.blocks.0.attention.dense" not in last_checkpoint(sparse)["state_dict"]
    module = build(lab.recipe(*SPARSE))
    with pytest.MonkeyPatch.context() as patch:
        shapes = {name.removeprefix("model."): tuple(t.shape) for name, t in after.items()}
        del shapes["blocks.0.attention.indexer.k.weight"]
        patch.setattr(core.run.loading, "shapes_of", lambda checkpoint: shapes)
        with pytest.raises(
            UserError, match=r"tensor blocks\.0\.attention\.indexer\.k\.weight is missing"
        ):
            added_to(module, tmp_path)


@pytest.mark.full
def test_ranks_start_from_weights_of_latent_attention(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    keys = (*TRAINED, "precision.name=fp64", f"initial_weights={finished}", "budget.steps=2")
    lab.fit(tmp_path / "one", *keys)
    for name in ("fsdp, ranks: 2", "expert_parallel, expert_ranks: 2"):
        run = tmp_path / name.partition(",")[0]
        fit_on_ranks(lab, run, *keys, f"strategy={{name: {name}}}")
        assert_same_end(run, tmp_path / "one")


@pytest.mark.full
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("more", [SPARSE, (*WARMUP, RECOMPUTE)])
def test_every_strategy_of_two_ranks_computes_what_one_process_does(
    lab: Lab, more: tuple[str, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled model of two ranks is compared with one that is not compiled."""
    backend = partial(compile_parts, backend="aot_eager")
    monkeypatch.setattr(core.run.run_model, "compile_parts", backend)
    keys = (*more, "compile=true") if compiled else more
    names = ("ddp", "fsdp", "experts")

    def work(rank: int) -> list[dict[str, Any]]:
        launch = Launch(rank, 2, "torchrun", port=1, local_rank=rank)
        return [asdict(Case(name, 2, keys).run(lab, launch)) for name in names]

    with tempfile.TemporaryDirectory() as folder:
        by_rank = on_ranks(work, Path(folder), world=2)
    alone = asdict(Case("ddp", 2, more).run(lab, None))
    for rank, results in enumerate(by_rank):
        for name, seen in zip(names, results, strict=True):
            compare(f"{name}, rank {rank}", alone, seen, is_first=rank == 0)


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["fsdp, ranks: 2", "expert_parallel, expert_ranks: 2"])
def test_sharded_checkpoints_resume_in_the_warm_up(lab: Lab, tmp_path: Path, strategy: str) -> None:
    """Frozen weights have no optimizer state in the checkpoint; the run continues on ranks and on one process."""
    keys = (*WARMUP, "model.attention.warmup_steps=3", *SHORT, "precision.name=fp64")
    ranks = (*keys, f"strategy={{name: {strategy}}}")
    fit_on_ranks(lab, tmp_path / "whole", *ranks)
    on_two = cut_after(tmp_path / "whole", 2, tmp_path / "two")
    on_one = shutil.copytree(on_two, tmp_path / "one")
    fit_on_ranks(lab, on_two, *ranks, resume=True)
    assert_same_end(on_two, tmp_path / "whole")
    lab.fit(on_one, *keys, resume=True)
    assert_same_end(on_one, tmp_path / "whole")
    assert last_checkpoint(on_one)["moeloom"]["windows_done"] == 4
