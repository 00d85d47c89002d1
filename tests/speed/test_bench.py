"""`core.bench` beside transformers: same loss, same text, rows and their fields, processes that end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import ROOT, Lab

from core.analysis.budget import plan_of
from core.contracts.errors import UserError
from core.speed import peer
from core.speed.batches import step_batches
from core.speed.decoding_speed import compare_texts, text_of
from core.speed.our_steps import LEARNING_RATE, OurSteps
from core.speed.peer import NoPeerError
from core.speed.processes import Probed, probe
from core.speed.shapes import QUICK, TRAINED, Shape, comparable
from core.speed.sides import Sides, memory
from core.speed.table import table
from core.speed.task import OURS, Task
from core.speed.turns import Turns
from core.speed.variants import Variants, against_peer

CPU = torch.device("cpu")
FIELDS = {"what", "size", "ratio", "interval", "fraction_of_limit", "memory_ratio"} | {
    "tokens_per_second",
    "versions",
    "threads",
    "device",
}


# ---- what is compared


def test_the_four_shapes_have_the_sizes_of_their_names() -> None:
    from core.assemble import build

    sizes = []
    for shape in TRAINED:
        recipe = comparable(shape).recipe
        model = build(recipe, device="meta")
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        experts = {layer.experts for layer in model.expert_layers().values()}
        sizes.append((round(millions, 1), *experts, recipe.batch.sequences))
        assert recipe.data.sequence_length in (256, 1024)
    assert sizes == [(7.1, 16, 8), (36.7, 32, 8), (36.7, 32, 2), (240.7, 64, 4)]


def test_parts_that_the_peer_lacks_are_left_out_and_named() -> None:
    found = comparable(QUICK)
    assert list(found.recipe.model.heads) == ["next_token"]
    balance = found.recipe.model.blocks["moe"].ffn.config.balance
    assert [section.name for section in balance] == ["bias"]
    assert found.notes == (
        "without model.heads.mtp",
        "without the balance loss of model.blocks.moe.ffn.balance (sequence)",
    )
    with pytest.raises(UserError, match=r"model\.heads: none predicts the next token"):
        comparable(Shape("x", QUICK.recipe, (*QUICK.overrides, "model.heads.next_token=null")))


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("precision.name=bf16_emulated", "precision.name = bf16_emulated"),
        ("optimizer.moments=bf16", "optimizer.name = adamw: the peer has torch's AdamW"),
        ("model.blocks.moe.ffn.router.affinity=softmax", "affinity must be sigmoid"),
    ],
)
def test_a_model_without_a_peer_has_a_sentence(override: str, why: str) -> None:
    recipe = comparable(Shape("x", QUICK.recipe, (*QUICK.overrides, override))).recipe
    with pytest.raises(NoPeerError, match=why):
        peer.check_expressible(recipe)


@pytest.mark.full
@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_sides_have_the_same_loss_and_take_the_same_step(
    tmp_path: Path, accumulate: int
) -> None:
    """Two steps move both sides' weights alike, by up to the learning rate each; norms of theirs are in fp32."""
    shape = Shape(
        "x",
        QUICK.recipe,
        (*QUICK.overrides, f"batch.accumulate={accumulate}", "precision.name=fp64"),
    )
    recipe = comparable(shape).recipe
    batches = step_batches(recipe, CPU)
    assert len(batches) == accumulate
    ours = OurSteps(recipe, batches, CPU, plan_of(recipe))
    folder = peer.export(recipe, ours.model, tmp_path)
    theirs = peer.PeerSteps(folder, recipe, batches, CPU)
    for experts in ("eager", "batched_mm"):
        theirs.use(experts)
        assert theirs.loss() == pytest.approx(ours.loss(), rel=1e-7)
        ours.run()
        theirs.run()
    again = tmp_path / "again"
    again.mkdir()
    before = peer.load(folder, CPU).parameters()
    moved = peer.load(peer.export(recipe, ours.model, again), CPU).parameters()
    for old, mine, other in zip(before, moved, theirs.weights, strict=True):
        assert (mine - old).abs().max() > 1e-6
        assert ((mine - other).abs() > 1e-2 * LEARNING_RATE).double().mean() < 1e-2


# ---- texts


def test_texts_are_compared_up_to_their_first_difference() -> None:
    def gap(row: int, written: list[int]) -> float:
        return {(0, 2): 0.5, (2, 0): 0.1}[row, len(written)]

    own = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert compare_texts(own, own, gap) == (9, None)
    assert compare_texts(own, [[1, 2, 0], [4, 5, 6], [0, 8, 9]], gap) == (5, 0.5)


def test_a_text_is_no_longer_than_the_model_reads() -> None:
    task = Task(comparable(QUICK), CPU, 1.0)
    assert text_of(task, 2, None, 64).context == 1000
    assert text_of(task, 2, None, 1100).context == 948
    with pytest.raises(UserError, match="--context 1990 with --new-tokens 64"):
        text_of(task, 1, 1990, 64)


# ---- processes


def test_a_process_that_takes_too_long_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it printed is there; the module reads its request from standard input and sleeps."""
    found = probe("tests.speed.sleeper", {"seconds": 60}, patience=0.7)
    assert found.why == "it took more than 1 s"
    pid = found.rows[0]["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_fails_says_why() -> None:
    assert probe("tests.speed.sleeper", {"seconds": "x"}).why.startswith("TypeError")  # type: ignore[union-attr]
    assert "signal 9" in (probe("tests.speed.sleeper", {"signal": 9}).why or "")


def test_a_variant_that_ends_its_process_is_left_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[list[str]] = []

    def fake(module: str, request: dict[str, Any], *, patience: float) -> Probed:
        tried.append(request["variants"])
        rows = []
        for name in request["variants"]:
            if name == "b":
                return Probed(rows, "signal 9 ended it")
            rows.append({"variant": name, "seconds": 1.0})
        return Probed(rows)

    monkeypatch.setattr("core.speed.sides.probe", fake)
    sides = Sides(Task(comparable(QUICK), CPU, 1.0), None, {"work": "decode"})
    names = ["a", "b", "c", "d, compiled", "e, compiled"]
    found = sides.screened(names, {"first_seconds": 1.0})
    assert tried == [["a", "b", "c"], ["c"], ["d, compiled"], ["e, compiled"]]
    assert found["b"] == {"error": "signal 9 ended it"}
    assert sorted(found) == names


def test_there_is_no_ratio_where_all_variants_of_the_peer_fail() -> None:
    failed = Variants(left_out={"eager": "MemoryError", "grouped_mm": "signal 9 ended it"})
    row = against_peer(Turns({OURS: [1.0]}), failed, 10)
    assert row["ratio"] is None
    assert row["no_ratio"] == "no variant of transformers runs here: see left_out"
    assert against_peer(Turns({OURS: [1.0]}), Variants("--no-peer"), 10)["no_ratio"] == "--no-peer"


def test_memory_is_the_peak_without_states() -> None:
    own = {"variant": "ours", "peak_bytes": 100, "state_bytes": 40}
    other = {"variant": "eager", "peak_bytes": 160, "state_bytes": 40}
    found = memory(own, other)
    assert (found["memory_ratio"], found["activation_ratio"]) == (100 / 160, 60 / 120)
    assert found["memory"]["theirs"]["variant"] == "eager"
    assert memory(own, {"error": "x"})["memory_ratio"] is None


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ranks", "2"), "--ranks: works with --collectives only"),
        (("--seconds", "0"), "--seconds = 0.0: must be more than 0"),
        (("--device", "cuda"), "--device = cuda: torch sees no GPU here"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    lab: Lab, arguments: tuple[str, ...], sentence: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = lab.command("bench", *arguments)
    assert done.code == 2
    assert sentence in done.sentence


def test_rows_that_are_no_numbers_are_a_usage_error(lab: Lab) -> None:
    done = lab.command("bench", "--rows", "1,,2")
    assert done.code == 2
    assert "error: argument --rows: '' is no whole number" in done.err


def test_without_transformers_the_command_names_the_extra(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = lab.command("bench", "--quick")
    assert done.code == 2
    assert "pip install 'moeloom[hf]', or give --no-peer" in done.sentence


def bench(*arguments: str) -> list[dict[str, Any]]:
    """The rows that the command prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "core.bench", "--json", *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


@pytest.mark.full
def test_the_command_trains_and_decodes_beside_transformers() -> None:
    rows = bench("--quick", "--context", "40", "--new-tokens", "8", "--rows", "2")
    assert [row["what"] for row in rows] == ["train", "prefill", "decode"]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["ratio"] > 0
        assert row["peer"]["best"] in row["variants"]
        assert row["ratio"] == min(v["ratio"] for v in row["variants"].values())
        assert row["memory_ratio"] > 0
        assert row["memory"]["ours"]["activation_bytes"] > 0
        assert {"eager", "batched_mm", "grouped_mm"} <= {
            name.partition(" / ")[0] for name in (*row["variants"], *row["left_out"])
        }
        assert row["start_seconds"]["ours"]["whole"] > 0
    assert 0 < rows[0]["fraction_of_limit"] < 1
    assert rows[0]["losses"]["ours"] == pytest.approx(rows[0]["losses"]["theirs"], rel=1e-4)
    for text in rows[2]["texts"].values():
        assert text["equal_tokens"] == 16
    shown = table(rows)
    assert shown[1].startswith("train     quick")
    assert shown[-1].endswith(f"transformers {rows[0]['versions']['transformers']}")


@pytest.mark.full
def test_a_recipe_that_transformers_cannot_express_is_measured_alone(lab: Lab) -> None:
    (row,) = bench(str(lab.file), "--what", "train", "--seconds", "0.2")
    assert row["ratio"] is None
    assert row["no_ratio"]
    assert row["fraction_of_limit"] > 0


@pytest.mark.full
def test_an_interrupt_ends_all_processes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "core.bench", "--quick", "--what", "train"]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not children(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "moeloom: interrupted"
    assert not children(process.pid)


def children(pid: int) -> list[str]:
    """The processes of a process's session other than itself."""
    done = subprocess.run(
        ["ps", "-o", "pid=", "-s", str(pid)], capture_output=True, text=True, check=False
    )
    return [line for line in done.stdout.split() if line != str(pid)]
