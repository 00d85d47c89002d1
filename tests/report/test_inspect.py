"""`core.inspect`: exact counts, the statistics against plain loops, the page, and errors of a user."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lab import Lab

from core.contracts.context import SequenceContext
from core.generation.markers import Markers
from core.inspection.counts import Counts
from core.inspection.document import Strings
from core.inspection.page import LARGEST, render
from core.inspection.statistic import (
    PRIOR,
    chance_bits,
    divergence_bits,
    entropy_bits,
    expected_together,
    log_odds,
)
from core.inspection.work import Options, inspect
from core.model.trace import trace_context
from core.run.evaluation import evaluate
from core.run.loading import load
from core.training.resume import newest_checkpoint
from core.training.validation import ValidationTotals

MOE = ("blocks.1", "heads.mtp.depths.0.block")


@pytest.fixture(scope="module")
def inspected(finished: Path) -> dict[str, Any]:
    """The document of the finished run."""
    return inspect(finished, Options()).document


def test_log_odds_are_those_of_the_paper() -> None:
    own = [7, 0, 3, 0]
    everywhere = [9, 20, 3, 0]
    found = log_odds(np.array(own), np.array(everywhere))
    for w in range(4):
        if not everywhere[w]:
            assert found[w] == 0
            continue
        prior = PRIOR * everywhere[w] / sum(everywhere)
        y_i, y_j = own[w], everywhere[w] - own[w]
        n_i, n_j = sum(own), sum(everywhere) - sum(own)
        first = math.log((y_i + prior) / (n_i + PRIOR - y_i - prior))
        second = math.log((y_j + prior) / (n_j + PRIOR - y_j - prior))
        deviation = math.sqrt(1 / (y_i + prior) + 1 / (y_j + prior))
        assert found[w] == pytest.approx((first - second) / deviation, rel=1e-9)


def test_the_neighbours_of_a_token_are_those_of_its_document() -> None:
    tokenizer: Any = SimpleNamespace(
        markers=Markers(begin=8, end=9), decode=lambda ids: " ".join(map(str, ids))
    )
    strings = Strings(tokenizer)
    assert strings.before(np.array([1, 9, 8, 2, 3])) == "2 3"
    assert strings.after(np.array([4, 5, 9, 8, 6])) == "4 5"
    assert strings.before(np.array([1, 2])) == "1 2"
    assert strings.after(np.array([], dtype=np.int64)) == ""


def test_entropy_divergence_and_chance_are_bits() -> None:
    assert entropy_bits(np.array([3, 3, 3, 3, 0])) == pytest.approx(2)
    assert entropy_bits(np.zeros(4, dtype=np.int64)) == 0
    everywhere = np.array([50, 50, 100, 0])
    assert divergence_bits(np.array([5, 5, 10, 0]), everywhere) == pytest.approx(0, abs=1e-12)
    assert divergence_bits(np.array([5, 0, 0, 0]), everywhere) == pytest.approx(2)
    many = np.full(1000, 10)
    assert chance_bits(200, many, 0) > 1 > chance_bits(100_000, many, 0)
    assert chance_bits(0, many, 0) == 0


def test_independent_experts_share_what_is_expected() -> None:
    together = np.array([[10, 4, 6], [4, 20, 8], [6, 8, 30]])
    expected = expected_together(together)
    assert expected.sum() == pytest.approx(2 * (4 + 6 + 8))
    assert expected[0, 1] / expected[1, 2] == pytest.approx(10 * 20 / (20 * 30))
    assert not expected.diagonal().any()
    assert not expected_together(np.diag([3, 4])).any()


def test_counts_are_the_loads_of_the_runs_own_validation(
    finished: Path, inspected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[list[int]]] = []
    compute = ValidationTotals.compute

    def keep(totals: ValidationTotals) -> dict[str, float]:
        loads = [totals._state(f"load {index}").tolist() for index in range(len(totals.layers))]
        measured.append(loads)
        return compute(totals)

    monkeypatch.setattr(ValidationTotals, "compute", keep)
    evaluate(newest_checkpoint(finished))
    assert [layer["path"] for layer in inspected["layers"]] == list(MOE)
    counted = []
    for layer in inspected["layers"]:
        counted.append([expert["load"] for expert in layer["experts"]])
        assert sum(counted[-1]) == layer["assignments"] > 0
    assert counted == measured[0]


def test_every_count_is_that_of_a_loop_over_the_assignments(finished: Path) -> None:
    model = load(finished)
    rows = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(2))
    valid = torch.arange(12) < torch.tensor([[12], [5], [1]])
    context = SequenceContext.of(
        rows,
        targets_BL=rows.roll(-1, 1),
        valid_BL=valid,
        source_B=torch.tensor([1, 0, 1]),
    )
    trace = trace_context(model, context)
    counts = Counts(300, ("a", "b"))
    counts.add(trace)
    for path in MOE:
        layer = counts.layers[path]
        block = trace.blocks[path]
        routing = block.routing
        assert routing is not None
        length = block.context.tokens_BL.shape[1]
        shift = 12 - length
        chosen: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for a in range(len(routing.token_A)):
            b, t = divmod(int(routing.token_A[a]), length)
            if block.context.valid()[b, t]:
                pair = (float(routing.gate_A[a]), int(routing.expert_A[a]))
                chosen.setdefault((b, t + shift), []).append(pair)
        by_token = np.zeros((8, 300), dtype=int)
        by_source = np.zeros((8, 2), dtype=int)
        together = np.zeros((8, 8), dtype=int)
        for (b, t), pairs in chosen.items():
            for _, one in pairs:
                by_token[one, int(rows[b, t])] += 1
                by_source[one, int(context.source_B[b])] += 1  # type: ignore[index]
                for _, two in pairs:
                    together[one, two] += 1
        assert (layer.assigned_EV == by_token).all()
        assert (layer.assigned_ES == by_source).all()
        assert (layer.together_EE == together).all()
        first = []
        for b, t in valid.nonzero().tolist():
            pairs = chosen.get((b, t), [(0.0, -1)])
            first.append(max(pairs, key=lambda pair: pair[0])[1])
        assert np.concatenate(layer.first).tolist() == first


@pytest.mark.full
def test_a_checkpoint_beside_itself_has_not_moved_and_beside_another_one_has(
    finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("abc deaf head cabbage " * 30, encoding="utf-8")
    same = inspect(finished, Options(text=file, beside=finished)).document
    for layer in same["moved"]:
        assert layer["stayed"] == layer["first"] > 0
        for expert in layer["experts"]:
            assert expert["load"][0] == expert["load"][1]
            assert expert["token_distance_bits"] in (None, 0)
    earlier = min((finished / "checkpoints").glob("step-*.ckpt"))
    other = inspect(finished, Options(text=file, beside=earlier)).document
    assert other["beside"]["checkpoint"] == earlier.name
    assert any(layer["stayed"] < layer["first"] for layer in other["moved"])


def test_the_command_writes_a_page_that_loads_nothing_and_a_document(
    lab: Lab, finished: Path, tmp_path: Path, inspected: dict[str, Any]
) -> None:
    page = tmp_path / "who.html"
    result = lab.command("inspect", finished, "--json", "--out", page)
    assert result.code == 0, result.err
    assert json.loads(result.out) == inspected
    assert inspected["schema"] == 1
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size <= LARGEST
    assert "http://" not in text
    assert "https://" not in text
    assert "src=" not in text.replace("script-src", "").replace("style-src", "")


@pytest.mark.parametrize("command", ["inspect", "report", "placement"])
def test_a_page_cannot_be_written_to_a_folder(
    lab: Lab, finished: Path, tmp_path: Path, command: str
) -> None:
    for folder in (tmp_path, Path("/")):
        result = lab.command(command, finished, "--out", folder)
        assert result.code == 2
        assert result.sentence == f"--out {folder}: cannot be written: Is a directory"
    assert list(tmp_path.iterdir()) == []


def test_no_token_can_end_the_pages_script(inspected: dict[str, Any]) -> None:
    evil = "</script><script>alert(1)</script>"
    spoilt = {**inspected, "run": evil}
    assert evil not in render(spoilt)
    assert render(inspected).count("</script>") == 2


@pytest.mark.full
def test_a_model_with_very_many_experts_has_a_page_under_the_limit(
    inspected: dict[str, Any],
) -> None:
    token = {"id": 12345, "text": " tokens", "z": 12.345, "count": 1234}
    token |= {"share_of_expert": 0.12345, "share_of_token": 0.5}
    place = {"before": "b" * 40, "token": "t", "after": "a" * 40}
    expert = {
        **inspected["layers"][0]["experts"][0],
        "tokens": [token] * 16,
        "contexts": [place] * 4,
        "together": [{"expert": 200, "count": 1000, "expected": 999.12345}] * 8,
    }
    layer = {**inspected["layers"][0], "experts": [expert] * 256}
    large = {**inspected, "layers": [{**layer, "path": f"blocks.{i}"} for i in range(58)]}
    first = {f"blocks.{i}": [200] * 3000 for i in range(58)}
    large["reading"] = {"ids": [], "tokens": [" tokens"] * 3000, "first": first}
    assert len(render(large).encode()) <= LARGEST


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no such file"), ("", "holds no text")],
)
def test_a_text_that_cannot_be_read_is_one_sentence(
    lab: Lab, finished: Path, tmp_path: Path, content: str | None, sentence: str
) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    result = lab.command("inspect", finished, "--text", file)
    assert result.code == 2
    assert sentence in result.err
    assert str(file) in result.err
    assert result.err.count("\n") == 1


def test_a_run_without_a_tokenizer_is_one_sentence(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "tokenizer.json").unlink()
    result = lab.command("inspect", copy)
    assert result.code == 2
    assert "tokenizer.json" in result.err
    assert lab.command("inspect", tmp_path / "none").code == 2
    assert lab.command("inspect", finished, "--tokens", "0").code == 2


def test_a_dense_run_says_that_there_are_no_experts(lab: Lab, tmp_path: Path) -> None:
    lab.fit(tmp_path / "dense", "model.blocks.moe.count=0", "budget.steps=1")
    found = inspect(tmp_path / "dense", Options()).document
    assert found["layers"] == []
    assert found["attention"][0]["path"] == "blocks.0"
    assert "This model has no experts" in render(found)


@pytest.mark.full
def test_a_converted_run_is_inspected_with_a_text(lab: Lab, finished: Path, tmp_path: Path) -> None:
    """It has no held-out documents, and its experts read what those of the run read."""
    lab.fit(tmp_path / "run", "model.blocks.moe.ffn.router.group_score=2", "budget.steps=2")
    assert lab.command("convert", "to-hf", tmp_path / "run", tmp_path / "hf").code == 0
    assert lab.command("convert", "from-hf", tmp_path / "hf", tmp_path / "again").code == 0
    file = tmp_path / "mine.txt"
    file.write_text("abc deaf head cabbage " * 30, encoding="utf-8")
    refused = lab.command("inspect", tmp_path / "again")
    assert refused.code == 2
    assert "give a text by --text" in refused.err
    found = inspect(tmp_path / "again", Options(text=file)).document
    assert [layer["path"] for layer in found["layers"]] == list(MOE)
    assert found["layers"][0]["assignments"] == 2 * found["text"]["tokens"]
