"""CUDA graphs on a GPU: a run that replays its steps computes the bits of one that does not."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lab import Lab, assert_same, last_checkpoint, loads, rows

from core.contracts.errors import UserError


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets `trainer.deterministic` use cuBLAS, and turns it off afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
RECIPE = (
    "compile=true",
    "precision.name=bf16",
    "trainer.deterministic=true",  # sums of gradients of one token's vector have no order otherwise
    "budget.steps=12",
    "batch={sequences: 2, accumulate: 2}",
    "model.heads.mtp={name: mtp, depth: 1, weight: {start: 0.5, segments: [{shape: linear, to: 0.1, until: 1.0}]}}",
    "model.blocks.moe.ffn.balance=[{name: bias, rate: 0.01}, {name: sequence, alpha: 0.1}]",
)
TIMES = ("tokens_per_second", "mfu")


def test_replayed_steps_are_those_of_a_run_without_a_graph(lab: Lab, tmp_path: Path) -> None:
    for name in ("false", "true"):
        lab.fit(tmp_path / name, *RECIPE, f"cuda_graph={name}")
    plain, replayed = tmp_path / "false", tmp_path / "true"
    own, other = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]
        for run in (replayed, plain)
    )
    assert own == other
    assert_same(loads(replayed), loads(plain))
    for key in ("state_dict", "optimizer_states"):
        assert_same(last_checkpoint(replayed)[key], last_checkpoint(plain)[key])


def test_a_run_goes_on_with_a_graph(lab: Lab, tmp_path: Path) -> None:
    """A run of 12 steps that is continued after 6 has the bits of one that was not stopped."""
    whole = tmp_path / "whole"
    lab.fit(whole, *RECIPE, "cuda_graph=true", "checkpoint.every_steps=6", "checkpoint.keep=2")
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "summary.json").unlink()
    for file in (parts / "checkpoints").glob("step-00000012*"):
        file.unlink()
    lab.fit(
        parts,
        *RECIPE,
        "cuda_graph=true",
        "checkpoint.every_steps=6",
        "checkpoint.keep=2",
        resume=True,
    )
    for key in ("state_dict", "optimizer_states"):
        assert_same(last_checkpoint(parts)[key], last_checkpoint(whole)[key])


def test_products_that_wait_for_the_device_are_refused_in_a_sentence(
    lab: Lab, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="multiplies in float32, which waits for the device"):
        lab.fit(tmp_path / "run", *RECIPE, "cuda_graph=true", "precision.name=fp32")


def test_a_step_that_cannot_be_captured_ends_the_run_in_a_sentence(
    lab: Lab, tmp_path: Path
) -> None:
    """Experts of a width that the kernel does not take are multiplied one after the other, after a wait."""
    with pytest.raises(UserError, match="this model's step cannot be captured"):
        lab.fit(
            tmp_path / "run", *RECIPE, "cuda_graph=true", "model.blocks.moe.ffn.expert_hidden=3"
        )
