"""Number formats in a bf16 run: counts stay int64 and biases fp32 in every place."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lab import MOE, Lab, last_checkpoint, loads

import core


class FormatRecorder(L.Callback):
    """Records the formats that a step computes with."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, torch.dtype]] = set()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.add((trainer.precision, torch.float32))
        self.seen |= {("load", load_E.dtype) for load_E in pl_module.step_load.values()}
        self.seen |= {("buffer", buffer.dtype) for buffer in pl_module.buffers()}
        self.seen |= {("weight", weight.dtype) for weight in pl_module.parameters()}
        self.seen |= {
            ("gradient", weight.grad.dtype)
            for weight in pl_module.parameters()
            if weight.grad is not None
        }


FORMATS = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


@pytest.mark.parametrize("precision", FORMATS)
def test_P1_training_keeps_biases_in_fp32_and_counts_in_int64(lab: Lab, precision: str) -> None:
    watch, kept = FormatRecorder(), FORMATS[precision]
    module = lab.train(f"precision.name={precision}", "budget.steps=2", callbacks=[watch])
    assert watch.seen == {
        ("32-true", torch.float32),
        ("load", torch.int64),
        ("buffer", torch.float32),
        ("weight", kept),
    }
    moments = [
        value
        for state in module.trainer.optimizers[0].state_dict()["state"].values()
        for name, value in state.items()
        if name != "step"
    ]
    assert {moment.dtype for moment in moments} == {kept}


def test_P1_a_bf16_run_keeps_them_through_save_and_load(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lab.fit(run, "precision.name=bf16", "budget.steps=3", "checkpoint.every_steps=2")
    state = last_checkpoint(run)["state_dict"]
    loaded = core.load(run)
    for path in MOE:
        name = f"{path}.ffn.balance.0.bias"
        assert state[f"model.{name}"].dtype == torch.float32
        assert state[f"model.{name}"].abs().max() > 0
        assert loaded.get_buffer(name).dtype == torch.float32
        assert torch.equal(loaded.get_buffer(name), state[f"model.{name}"])
        assert torch.equal(loaded.to(torch.bfloat16).get_buffer(name), state[f"model.{name}"])
    assert {t.dtype for name, t in loads(run).items() if name.startswith("load.")} == {torch.int64}
    assert {t.dtype for name, t in loads(run).items() if name.startswith("bias.")} == {
        torch.float32
    }


def test_P1_a_bias_at_which_bf16_would_round_reaches_the_checkpoint_whole(
    lab: Lab, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rate = "model.blocks.moe.ffn.balance.0.rate=0.1001"
    lab.fit(run, "precision.name=bf16", rate, "budget.steps=1")
    bias_E = last_checkpoint(run)["state_dict"][f"model.{MOE[0]}.ffn.balance.0.bias"]
    moved = bias_E[bias_E != 0].abs()
    assert set(moved.tolist()) == {float(torch.tensor(0.1001))}
    assert float(torch.tensor(0.1001)) != float(torch.tensor(0.1001).bfloat16())
