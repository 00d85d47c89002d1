"""Whole runs with hyper-connections and a multi-token module that reads the streams: resumed, and on several ranks."""

from pathlib import Path

import pytest
from lab import Lab, assert_same_run
from rank_runs import assert_same_end, cut_after, fit_on_ranks

STREAMS = (
    "model.residual={name: hyper_connections, scale: 0.01}",
    "model.heads.mtp={name: mtp, depth: 1, weight: 0.3, reads: streams}",
)
STRATEGIES = {
    "ddp": "strategy={name: ddp, ranks: 2, accelerator: cpu}",
    "fsdp": "strategy={name: fsdp, ranks: 2}",
    "expert_parallel": "strategy={name: expert_parallel, expert_ranks: 2}",
}
EVERY_CHECKPOINT = ("checkpoint.keep=9", "checkpoint.every_steps=5")


@pytest.mark.full
def test_a_run_resumes_to_the_bit(lab: Lab, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    lab.fit(whole, *STREAMS, *EVERY_CHECKPOINT)
    cut = cut_after(whole, 5, tmp_path / "cut")
    lab.fit(cut, *STREAMS, *EVERY_CHECKPOINT, resume=True)
    assert_same_run(cut, whole)


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_end_as_one(lab: Lab, tmp_path: Path, strategy: str) -> None:
    alone = tmp_path / "alone"
    both = tmp_path / "both"
    settings = (*STREAMS, "precision.name=fp64", "recompute.blocks=[moe]")
    lab.fit(alone, *settings)
    fit_on_ranks(lab, both, *settings, STRATEGIES[strategy])
    assert_same_end(alone, both)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16_emulated", "fp8_emulated"])
def test_low_precisions_train(lab: Lab, tmp_path: Path, precision: str) -> None:
    """The loss after twelve steps is within 2% of that in fp32."""
    losses = []
    for name in ("fp32", precision):
        summary = lab.fit(tmp_path / name, *STREAMS, f"precision.name={name}")
        losses.append(summary["val_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_format_that_has_no_streams_is_refused_before_work_starts(
    lab: Lab, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    lab.fit(run, STREAMS[0], "budget.steps=1")
    found = lab.command("convert", "to-hf", run, tmp_path / "out")
    assert found.code == 2
    assert "model.residual.name" in found.sentence
    assert "must be add" in found.sentence
    assert not (tmp_path / "out").exists()
