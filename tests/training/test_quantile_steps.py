"""Quantile Balancing inside a run: exact biases, whatever a step is split into, recomputed, skipped or resumed.

The conformance kit checks splits, recomputation and evaluation on its small model by default; whole runs are in the
tier `full`.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from exact_cases import RECOMPUTE, Case, compare
from lab import MOE, Lab, assert_same, last_checkpoint, loads, rows
from rank_runs import cut_after
from routing_reference import needed_biases, quantile_histogram, quantile_step
from test_guard import Poison
from test_window import FP64, Gradients, after, assert_close, cut, padded
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.router import Routing
from core.testing.forked_ranks import on_ranks
from core.training.launchers import Launch

QUANTILE = "model.blocks.moe.ffn.balance=[{name: quantile}]"
BINS = 1000


class Watch(L.Callback):
    """Records every routing that is tallied, and the bias after each step, of each layer with experts."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Routing, SequenceContext]]] = {path: [] for path in MOE}
        self.biases: dict[str, list[Tensor]] = {path: [] for path in MOE}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for path in MOE:
            balancer = pl_module.model.get_submodule(f"{path}.ffn").balancers[0]
            balancer.tally = self._watched(balancer.tally, self.seen[path])

    @staticmethod
    def _watched(tally: Any, seen: list[tuple[Routing, SequenceContext]]) -> Any:
        def watched(routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
            seen.append((routing, context))
            result: dict[str, Tensor] = tally(routing, context)
            return result

        return watched

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for path in MOE:
            layer = pl_module.model.get_submodule(f"{path}.ffn")
            self.biases[path].append(layer.balancers[0].bias.clone())


def test_P4_one_update_a_step_from_all_its_micro_batches_the_multi_token_module_included(
    lab: Lab,
) -> None:
    """Biases of both layers equal a loop over the definition, with padding; the module's tokens are one less a row."""
    watch = Watch()
    windows = [cut(padded(lengths), [2, 2]) for lengths in ([16, 3, 0, 9], [1, 16, 16, 7])]
    lab.train(*FP64, QUANTILE, windows=windows, callbacks=[watch])
    for path, fewer in zip(MOE, (0, 1), strict=True):
        bias = [0.0] * 8
        assert len(watch.seen[path]) == 4
        for step, lengths in enumerate(([16, 3, 0, 9], [1, 16, 16, 7])):
            needed = []
            for routing, context in watch.seen[path][2 * step : 2 * step + 2]:
                counted = routing.scores_TE[context.valid().flatten()].tolist()
                assert routing.limit == (4, 2, 1)
                needed += needed_biases(counted, bias, 2, **routing.limit._asdict())
            assert len(needed) == sum(max(length - fewer, 0) for length in lengths)
            bias = quantile_step(quantile_histogram(needed, bias, BINS), bias, 2)
            found = watch.biases[path][step]
            torch.testing.assert_close(found, torch.tensor(bias), rtol=1e-6, atol=1e-6)
            bias = found.double().tolist()
        assert max(bias) > 0.01


@pytest.mark.full
def test_P9_accumulation_changes_no_bias(lab: Lab) -> None:
    found = []
    for sequences, accumulate in ((8, 1), (2, 4), (1, 8)):
        gradients, watch = Gradients(), Watch()
        batch = f"batch={{sequences: {sequences}, accumulate: {accumulate}}}"
        module = lab.train(*FP64, QUANTILE, batch, "budget.steps=2", callbacks=[gradients, watch])
        found.append((after(module, gradients), watch.biases))
    for other, biases in found[1:]:
        assert_close(other, found[0][0])
        assert_same(biases, found[0][1])


@pytest.mark.full
def test_P2_recomputation_changes_no_bit(lab: Lab) -> None:
    plain, again = Watch(), Watch()
    one = lab.train(QUANTILE, "budget.steps=2", callbacks=[plain])
    two = lab.train(QUANTILE, "budget.steps=2", RECOMPUTE, callbacks=[again])
    assert_same(two.state_dict(), one.state_dict())
    assert_same(again.biases, plain.biases)


@pytest.mark.full
def test_P4_evaluation_changes_nothing(lab: Lab) -> None:
    one, two = (
        lab.train(QUANTILE, f"validation.every_steps={every}", "budget.steps=3")
        for every in (1, 100)
    )
    assert one.validated
    assert_same(one.state_dict(), two.state_dict())
    assert_same(one.step_values, two.step_values)


def test_P4_a_skipped_step_changes_no_bias(lab: Lab) -> None:
    poison = Poison({1}, float("nan"))
    lab.train(QUANTILE, "budget.steps=3", callbacks=[poison])
    before, skipped, later = poison.left
    assert_same(skipped, before)
    name = "blocks.1.ffn.balance.0.bias"
    assert not torch.equal(later["model"][name], skipped["model"][name])


@pytest.mark.full
def test_a_run_resumes_to_the_same_bits(lab: Lab, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    lab.fit(whole, QUANTILE, "budget.steps=6", "checkpoint.every_steps=3")
    cut_short = cut_after(whole, 3, tmp_path / "cut")
    lab.fit(cut_short, QUANTILE, "budget.steps=6", "checkpoint.every_steps=3", resume=True)
    for name in ("metrics.csv", "loads.safetensors"):
        assert (cut_short / name).exists()
    one, two = last_checkpoint(cut_short), last_checkpoint(whole)
    for key in ("state_dict", "optimizer_states"):
        assert_same(one[key], two[key])
    assert_same(rows(cut_short), rows(whole))
    assert_same(loads(cut_short), loads(whole))
    bias = one["state_dict"]["model.blocks.1.ffn.balance.0.bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, loads(whole)["bias.blocks.1"][-1])
    assert float(bias.max() - bias.min()) > 0.01


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16_emulated", "fp8_emulated"])
def test_P1_biases_stay_fp32_in_every_precision(lab: Lab, precision: str) -> None:
    module = lab.train(QUANTILE, f"precision={{name: {precision}}}", "budget.steps=1")
    for path in MOE:
        bias = module.model.get_submodule(f"{path}.ffn").balancers[0].bias
        assert bias.dtype == torch.float32
        assert bias.any()


RANKS = [Case("ddp", 2, (QUANTILE,)), Case("experts", 1, (QUANTILE, RECOMPUTE))]


@pytest.mark.full
def test_two_ranks_reach_the_biases_of_one(lab: Lab) -> None:
    """The ranks have unequal numbers of valid tokens; experts are divided between them in the second case."""

    def work(rank: int) -> list[dict[str, Any]]:
        launch = Launch(rank, 2, "torchrun", port=1, local_rank=rank)
        return [asdict(case.run(lab, launch)) for case in RANKS]

    with tempfile.TemporaryDirectory() as folder:
        by_rank = on_ranks(work, Path(folder), world=2)
    for index, case in enumerate(RANKS):
        alone = asdict(case.run(lab, None))
        for rank, results in enumerate(by_rank):
            compare(f"{case}, rank {rank}", alone, results[index], is_first=rank == 0)
