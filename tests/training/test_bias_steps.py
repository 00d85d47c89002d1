"""The bias controller inside a run: exact values from the logged integers."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lab import MOE, Lab, assert_same, last_checkpoint, loads, rows
from tiers import first_by_default
from torch import Tensor

from core.training import callbacks

EXPERTS, RATE = 8, 0.01


def replay(load_SE: Tensor, rate: float = RATE) -> Tensor:
    """Algorithm 1, expert by expert, in fp32: the bias after every step, computed from the loads alone."""
    bias, history = [np.float32(0)] * EXPERTS, []
    for load in load_SE.tolist():
        for expert in range(EXPERTS):
            if load[expert] * EXPERTS > sum(load):
                bias[expert] = np.float32(bias[expert] - np.float32(rate))
            elif load[expert] * EXPERTS < sum(load):
                bias[expert] = np.float32(bias[expert] + np.float32(rate))
        history.append([float(b) for b in bias])
    return torch.tensor(history)


class History(L.Callback):
    """Records every step's load and the bias after it."""

    def __init__(self) -> None:
        self.loads: dict[str, list[Tensor]] = {path: [] for path in MOE}
        self.biases: dict[str, list[Tensor]] = {path: [] for path in MOE}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for path in MOE:
            self.loads[path].append(pl_module.step_load[path].clone())
            self.biases[path].append(
                pl_module.model.get_submodule(f"{path}.ffn").balancers[0].bias.clone()
            )


@pytest.mark.parametrize("path", MOE)
def test_P5_the_logged_bias_follows_from_the_logged_loads_exactly(
    finished: Path, path: str
) -> None:
    logged = loads(finished)
    assert logged["steps"].tolist() == list(range(1, 13))
    assert torch.equal(logged[f"bias.{path}"], replay(logged[f"load.{path}"]))
    assert logged[f"bias.{path}"][-1].abs().max() > 0.05


@pytest.mark.parametrize("path", MOE)
def test_the_checkpoint_holds_the_last_logged_bias(finished: Path, path: str) -> None:
    state = last_checkpoint(finished)["state_dict"]
    assert torch.equal(
        state[f"model.{path}.ffn.balance.0.bias"], loads(finished)[f"bias.{path}"][-1]
    )


def test_P2_load_is_tokens_times_top_k_in_int64(finished: Path) -> None:
    logged = loads(finished)
    # micro-batches x sequences x tokens x top_k
    expected = {MOE[0]: 2 * 4 * 16 * 2, MOE[1]: 2 * 4 * 15 * 2}
    for path, total in expected.items():
        assert logged[f"load.{path}"].dtype == torch.int64
        assert logged[f"load.{path}"].sum(dim=1).tolist() == [total] * 12
        assert logged[f"bias.{path}"].dtype == torch.float32


def test_the_logged_max_vio_is_that_of_the_logged_integers(finished: Path) -> None:
    logged = loads(finished)
    steps = [row for row in rows(finished) if "lr" in row]
    for index, row in enumerate(steps):
        of_layers = [logged[f"load.{path}"][index].tolist() for path in MOE]
        expected = np.mean([max(load) / (sum(load) / EXPERTS) - 1 for load in of_layers])
        assert float(row["load/max_vio_batch"]) == pytest.approx(expected, rel=1e-12)


def test_P4_a_step_of_three_micro_batches_moves_the_bias_once(lab: Lab) -> None:
    history = History()
    lab.train("batch.accumulate=3", "budget.steps=4", callbacks=[history])
    for path in MOE:
        load_SE, bias_SE = torch.stack(history.loads[path]), torch.stack(history.biases[path])
        assert torch.equal(bias_SE, replay(load_SE))
        assert bias_SE[0].abs().max() == torch.tensor(RATE)
    assert [int(load_E.sum()) for load_E in history.loads[MOE[0]]] == [3 * 4 * 16 * 2] * 4


def test_the_rate_follows_its_schedule(lab: Lab) -> None:
    history = History()
    rate = "{unit: steps, start: 0.02, segments: [{until: 1}, {until: 9, to: 0.0}]}"
    lab.train(f"model.blocks.moe.ffn.balance.0.rate={rate}", "budget.steps=3", callbacks=[history])
    for path in MOE:
        biases = history.biases[path]
        assert torch.equal(biases[0], replay(torch.stack(history.loads[path][:1]), rate=0.02)[0])
        assert_same(biases[1:], [biases[0], biases[0]])


def test_P4_evaluation_changes_nothing(lab: Lab) -> None:
    """A run that validates after every step has the bits of one that never does."""
    one, two = (
        lab.train(f"validation.every_steps={every}", "budget.steps=4") for every in (1, 100)
    )
    assert one.validated
    assert_same(one.state_dict(), two.state_dict())
    assert_same(one.step_values, two.step_values)
    assert_same(one.trainer.optimizers[0].state_dict(), two.trainer.optimizers[0].state_dict())


@pytest.mark.parametrize("blocks", first_by_default(["[dense, moe]", "[moe]"]))
def test_P2_recomputation_changes_no_bit(lab: Lab, blocks: str) -> None:
    plain, again = History(), History()
    one = lab.train("budget.steps=3", callbacks=[plain])
    two = lab.train("budget.steps=3", f"recompute.blocks={blocks}", callbacks=[again])
    assert_same(two.state_dict(), one.state_dict())
    assert_same(two.step_values, one.step_values)
    assert_same(again.loads, plain.loads)
    assert_same(again.biases, plain.biases)


def test_a_long_log_is_thinned_evenly(
    lab: Lab, finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(callbacks, "SNAPSHOTS", 5)
    lab.fit(tmp_path / "run")
    thin, whole = loads(tmp_path / "run"), loads(finished)
    assert thin["steps"].tolist() == [4, 8, 12]
    for name in whole:
        assert torch.equal(thin[name], whole[name][[3, 7, 11]]), name
    assert_same(
        last_checkpoint(tmp_path / "run")["state_dict"], last_checkpoint(finished)["state_dict"]
    )


def test_without_balancers_there_is_load_and_no_bias(lab: Lab, tmp_path: Path) -> None:
    summary = lab.fit(tmp_path / "run", "model.blocks.moe.ffn.balance=[]", "budget.steps=2")
    assert {name.partition(".")[0] for name in loads(tmp_path / "run")} == {"steps", "load"}
    assert summary["max_vio_batch"] > 0
    assert not [column for column in rows(tmp_path / "run")[0] if "balance" in column]
