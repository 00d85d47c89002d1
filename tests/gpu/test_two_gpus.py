"""The parts of benchmarks/gpu.py for two GPUs: intervals, ratios and token files by hand, and a whole dry run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.on_gpu import ranks, scaling
from benchmarks.on_gpu.measure import Lab
from benchmarks.run_plugin.overlap import shares
from benchmarks.run_plugin.token_file import TokenFile
from benchmarks.token_file import write
from core.assemble import build
from core.contracts.errors import UserError
from core.data.tokenizer import train
from core.recipe.compose import compose

ROOT = Path(__file__).resolve().parents[2]


def test_exchange_is_covered_while_computation_runs() -> None:
    """Exchange from 0 to 10 and from 20 to 30; computation from 5 to 22 and, within that, from 6 to 7."""
    found = shares([(0, 10), (20, 30)], [(5, 22), (6, 7)])
    assert found["exchange_seconds"] == pytest.approx(20e-9)
    assert found["computation_seconds"] == pytest.approx(17e-9)
    assert found["covered_seconds"] == pytest.approx(7e-9)
    assert found["covered_share"] == pytest.approx(7 / 20)
    assert shares([], [(0, 1)])["covered_share"] == 0


def test_a_ratio_is_of_throughputs_in_the_same_turn() -> None:
    """Steps of one rank take 1 s and then 2 s, of two 1.25 s and 2 s: twice the work in 1.25 and 1 times the time."""

    def ran(seconds: float, *cpus: float) -> dict[str, Any]:
        rows = [
            {"step": step, "seconds": 9.0 if step <= scaling.WARM else seconds, "profiled": False}
            for step in range(1, 9)
        ]
        found = {"rows": rows, "peak_bytes": [1], "start": [], "overrides": [], "ended": "finished"}
        return found | {"cpu_seconds": [[9.0] * scaling.WARM + [cpu, cpu, 5 * cpu] for cpu in cpus]}

    runs = {name: [] for name in scaling.STRATEGIES} | {
        "one": [ran(1.0, 1.0), ran(2.0, 1.5)],
        "ddp": [ran(1.25, 1.0, 1.5), ran(2.0, 1.5, 1.5)],
        "fsdp": [{**ran(1.0, 1.0), "rows": [], "cpu_seconds": []}],
    }
    found = scaling.results(runs, dict.fromkeys(scaling.GOALS, 5.0))
    assert found["ddp"]["ratio"]["all"] == [1.6, 2.0]
    assert found["ddp"]["cpu_ratio"]["all"] == [1.6, 2.0]
    assert found["ddp"]["goal"] == 1.85
    assert "ratio" not in found["fsdp"]  # its only turn was cut off
    assert found["fsdp"]["step_seconds"] == []
    assert "ratio" not in found["expert_parallel"]


def test_bytes_of_gradients_and_weights_by_strategy(tmp_path: Path) -> None:
    """With one micro-batch in fp32: `ddp` a weight each way, `fsdp` half of it for two gathers and one scatter."""
    lab = Lab("cpu", True, tmp_path, overrides=["batch.accumulate=1"])
    ddp, fsdp, experts = (scaling.gradient_and_weight_bytes(lab, name) for name in scaling.GOALS)
    model = build(compose("dsv3_1b", scaling.changes(lab, "ddp")), device="meta")
    total = sum(weight.numel() for weight in model.parameters())
    blocks = sum(weight.numel() for weight in model.blocks.parameters())
    stacks = sum(weight.numel() for weight in model.parameters() if weight.ndim == 3)
    assert ddp == 4 * total
    assert fsdp == (2 * 4 * blocks + 4 * (total - blocks) + 4 * total) / 2
    assert experts == fsdp - (3 * 4 * stacks) / 2


def test_steps_that_warm_up_or_are_profiled_do_not_count() -> None:
    rows = [{"step": n, "seconds": float(n), "profiled": n == 5} for n in range(1, 6)]
    assert ranks.step_seconds(rows, 2) == [3.0, 4.0]
    assert ranks.tokens_per_second(rows, 12, 2)["all"] == [4.0, 3.0]
    assert ranks.tokens_per_second(rows, 12, 5) == {}


def test_what_a_run_wrote_is_read_also_while_it_writes(tmp_path: Path) -> None:
    marks = {"callbacks_made": 103.5}
    step = {"step": 1, "at": 110.0, "peak_bytes": 7, "cpu_seconds": 0.5}
    text = "\n".join(json.dumps(one) for one in (marks, step))
    (tmp_path / "steps-0.jsonl").write_text(text + '\n{"step": 2, "at"', encoding="utf-8")
    found = ranks.read_ranks(tmp_path, 2, began=100.0)
    assert found["start"] == [{"callbacks_made": 3.5, "first_step_done": 10.0}]
    assert found["rows"] == [step]
    assert found["peak_bytes"] == [7]
    assert found["cpu_seconds"] == [[0.5]]


def corpus(folder: Path, vocabulary: int | None = None) -> TokenFile:
    """The corpus of a folder."""
    return TokenFile(TokenFile.Config(folder=str(folder), vocabulary=vocabulary))


def test_a_token_file_holds_whole_documents_behind_markers(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat " * 5, "a dog " * 10, "one more text " * 10]
    tokenizer = tmp_path / "trained.json"
    tokenizer.write_text(train(texts, 270).to_json(), encoding="utf-8")
    write(texts, tokenizer, tmp_path / "out", 100, 30)
    made = corpus(tmp_path / "out")
    assert made.vocabulary == 270
    validation = [block.tokens for block in made.blocks("validation")]
    training = [block.tokens for block in made.blocks("train")]
    assert sum(map(len, validation)) == 30
    assert sum(map(len, training)) == 70
    assert len(training) == 2
    for tokens in (*validation, *training):
        assert tokens[0] == 0
        assert min(tokens[1:]) > 0
    small = corpus(tmp_path / "out", 7)
    folded = np.concatenate([block.tokens for block in small.blocks("train")])
    assert small.vocabulary == 7
    assert folded.max() < 7
    assert (folded == 0).sum() == 2


def test_a_token_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens\.npz: is missing; benchmarks/token_file\.py"):
        corpus(tmp_path).check_source()


def test_large_trains_measures_and_profiles_on_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "large", "--quick", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--set", "budget.steps=7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu-quick.json").read_text(encoding="utf-8"))["large"]["found"]
    assert found["ended"] == "finished"
    assert len(found["losses"]) == 7
    assert found["losses"][-1] < found["losses"][0]
    assert (
        len(found["tokens_per_second_per_gpu"]["all"]) == 2
    )  # two steps warm up, three are profiled
    assert found["exchanged"]["exchange/bytes_inside_nodes"] > 0
    for start, overlap in zip(found["start"], found["overlap"], strict=True):
        assert 0 < start["ranks_met"] < start["model_ready"] < start["first_step_done"]
        assert overlap["exchange_seconds"] > 0
        assert 0 <= overlap["covered_share"] <= 1
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "| large | tokens/s per GPU |" in done.stdout
