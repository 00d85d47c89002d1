"""Resuming a run whose files are damaged: one sentence before any step, or the run goes on and nothing is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, rows
from tiers import first_by_default

from core.contracts.errors import UserError
from core.data.tokenizer import VERSION
from core.training.metrics_file import check_metrics, read_metrics
from core.training.run_folder import RunFolder

STEPS = 10
"""The step of the checkpoint from which the damaged runs continue."""


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A run that was killed after step 12, with a checkpoint of step 10."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("summary.json", "sample.txt", "checkpoints/step-00000012.ckpt"):
        (folder / name).unlink()
    return folder


def damage_line(number: int, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A damage to one line of a file."""

    def damage(file: Path) -> None:
        lines = file.read_bytes().splitlines(keepends=True)
        lines[number - 1] = change(lines[number - 1])
        file.write_bytes(b"".join(lines))

    return damage


def cut(file: Path) -> None:
    """Removes the rows after step 7."""
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:8]))


def become_folder(file: Path) -> None:
    """Puts a folder in the place of a file."""
    file.unlink(missing_ok=True)
    file.mkdir()


LOGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "is incomplete: the rows of steps 7 to 10 are missing"),
    "empty": (lambda file: file.write_bytes(b"") and None, "the rows of steps 1 to 10 are missing"),
    "NULs": (damage_line(4, lambda line: bytes(len(line) - 1) + b"\n"), "line 4 is damaged"),
    "garbage": (
        damage_line(5, lambda line: b"what is this\n"),
        "line 5 is damaged: it has 1 cells",
    ),
    "extra cells": (
        damage_line(3, lambda line: line[:-2] + b",1,2\n"),
        "line 3 is damaged: it has",
    ),
    "no UTF-8": (damage_line(6, lambda line: b"\xff" + line), "line 6 is damaged: 'utf-8' codec"),
    "folder": (become_folder, "is a folder, not a file"),
    "no header": (damage_line(1, lambda line: b"1,2,3\n"), "line 1 is damaged: it must name"),
}


@pytest.mark.parametrize("what", LOGS)
def test_a_damaged_log_is_a_sentence_that_says_how_to_go_on(
    what: str, stopped: Path, tmp_path: Path
) -> None:
    damage, why = LOGS[what]
    file = stopped / "metrics.csv"
    damage(file)
    with pytest.raises(UserError) as caught:
        check_metrics(file, step=STEPS, every=1)
    sentence = str(caught.value)
    assert sentence.startswith(str(file))
    assert why in sentence
    assert "its log begins with step 11" in sentence


def test_a_cut_log_stops_a_resumption_before_anything_is_written(lab: Lab, stopped: Path) -> None:
    cut(stopped / "metrics.csv")
    before = (stopped / "metrics.csv").read_bytes()
    result = lab.command("fit", lab.file, "--resume", stopped)
    assert result.code == 2
    assert "steps 7 to 10" in result.sentence
    assert (stopped / "metrics.csv").read_bytes() == before
    assert not (stopped / "summary.json").exists()


def test_a_log_that_was_removed_costs_a_note_that_the_summary_keeps(
    lab: Lab, stopped: Path
) -> None:
    (stopped / "metrics.csv").unlink()
    result = lab.command("fit", lab.file, "--resume", stopped)
    assert result.code == 0, result.err
    assert "the rows of steps 1 to 10 are lost" in result.err
    notices = json.loads((stopped / "summary.json").read_text(encoding="utf-8"))["notices"]
    assert any("steps 1 to 10 are lost" in notice for notice in notices)
    assert {row["step"] for row in rows(stopped)} == {"11", "12"}


@pytest.mark.full
def test_steps_may_be_written_as_numbers_with_a_point(
    lab: Lab, stopped: Path, finished: Path
) -> None:
    file = stopped / "metrics.csv"
    text = file.read_text(encoding="utf-8")
    for step in range(1, 13):
        text = text.replace(f",0.0,{step},", f",0.0,{step}.0,")
    file.write_text(text, encoding="utf-8")
    lab.fit(stopped, resume=True)
    assert rows(stopped) == rows(finished)


def test_the_mark_that_an_editor_writes_first_is_part_of_no_column(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("\ufeffstep,loss\n1,1.0\n", encoding="utf-8")
    found = read_metrics(file)
    assert found is not None
    assert (found.columns, found.rows) == (["step", "loss"], [{"step": "1", "loss": "1.0"}])


def test_a_version_in_the_provenance_that_is_no_text_counts_as_none(stopped: Path) -> None:
    file = stopped / "provenance.json"
    provenance = json.loads(file.read_text(encoding="utf-8"))
    provenance["packages"]["tokenizers"] = "\udc9f"
    file.write_text(json.dumps(provenance), encoding="utf-8")
    assert RunFolder(stopped).recorded_data().version == VERSION


def test_a_log_of_every_fifth_step_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss\n5,1.0\n10,0.5\n", encoding="utf-8")
    assert check_metrics(file, step=14, every=5) == []
    with pytest.raises(UserError, match="steps 11 to 15"):
        check_metrics(file, step=15, every=5)
    assert check_metrics(tmp_path / "none.csv", step=4, every=5) == []


def provenance_without_data(run: Path) -> None:
    """Removes the fingerprint of the data."""
    content = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    del content["data"]
    (run / "provenance.json").write_text(json.dumps(content), encoding="utf-8")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no provenance": (
        lambda run: (run / "provenance.json").unlink(),
        "provenance.json: there is no such file; it says which data",
    ),
    "empty provenance": (
        lambda run: (run / "provenance.json").write_text(""),
        "provenance.json: is empty, and must hold a JSON object",
    ),
    "no data": (provenance_without_data, "provenance.json: data: the fingerprint"),
    "nested provenance": (
        lambda run: (run / "provenance.json").write_text("[" * 100_000),
        "is nested more than 100 levels deep",
    ),
    "loads": (lambda run: become_folder(run / "loads.safetensors"), "is a folder, not a file"),
    "sample": (lambda run: (run / "sample.txt").mkdir(), "sample.txt: is a folder, not a file"),
    "tensorboard": (
        lambda run: shutil.rmtree(run / "tensorboard") or (run / "tensorboard").write_text(""),
        "tensorboard: must be a folder",
    ),
}


@pytest.mark.parametrize("what", first_by_default(FILES, keep=2))
def test_a_damaged_file_of_a_run_is_a_sentence(
    what: str, lab: Lab, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, why = FILES[what]
    damage(stopped)
    before = (stopped / "metrics.csv").read_bytes()
    with pytest.raises(UserError) as caught:
        lab.fit(stopped, resume=True)
    assert why in str(caught.value)
    assert (stopped / "metrics.csv").read_bytes() == before


def set_at(content: Any, *path_and_value: Any) -> None:
    """Replaces the value at a path."""
    *path, last, value = path_and_value
    for key in path:
        content = content[key]
    content[last] = value


HEAD = "model.output.weight"
CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda c: c["state_dict"].pop(HEAD), "tensor output.weight is missing"),
    "extra": (
        lambda c: set_at(c, "state_dict", "model.more", torch.ones(1)),
        "tensor more is not of this model",
    ),
    "shape": (
        lambda c: set_at(c, "state_dict", HEAD, torch.ones(3, 2)),
        "tensor output.weight is [3, 2], the model's [300, 32]",
    ),
    "no optimizer": (lambda c: c.pop("optimizer_states"), "its part optimizer_states is missing"),
    "no loops": (lambda c: c.pop("loops"), "its part loops is missing"),
    "moments": (
        lambda c: set_at(c, "optimizer_states", 0, "state", 3, "exp_avg", torch.ones(1)),
        "state.3.exp_avg: must have the shape",
    ),
    "groups": (
        lambda c: set_at(c, "optimizer_states", 0, "param_groups", []),
        "0 groups of parameters",
    ),
    "step": (lambda c: set_at(c, "moeloom", "windows_done", 3), "its name says step 10"),
    "count": (
        lambda c: set_at(c, "moeloom", "skipped_steps", "many"),
        "moeloom.skipped_steps = 'many': must be a whole number",
    ),
    "callback": (
        lambda c: set_at(c, "callbacks", "LoadLog", "stride", None),
        "the run cannot continue from it: TypeError",
    ),
    "no moeloom": (lambda c: c.pop("moeloom"), "a file of another program"),
}


@pytest.mark.parametrize("what", first_by_default(CHECKPOINTS, keep=2))
def test_a_checkpoint_that_does_not_fit_is_a_sentence(what: str, lab: Lab, stopped: Path) -> None:
    change, why = CHECKPOINTS[what]
    file = stopped / "checkpoints" / "step-00000010.ckpt"
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    before = (stopped / "metrics.csv").read_bytes()
    with pytest.raises(UserError) as caught:
        lab.fit(stopped, resume=True)
    assert str(file) in str(caught.value)
    assert why in str(caught.value)
    assert (stopped / "metrics.csv").read_bytes() == before


DAMAGED_SUMMARIES = ["", "[" * 100_000, "{", "[]", "{}", '{"notices": 3}']


@pytest.mark.parametrize("text", first_by_default(DAMAGED_SUMMARIES, keep=2))
def test_a_damaged_summary_of_a_complete_run_says_how_it_is_made_again(
    text: str, lab: Lab, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    summary = folder / "summary.json"
    summary.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"summary.json: .*move the file away, and --resume"):
        lab.fit(folder, resume=True)
    assert summary.read_text(encoding="utf-8") == text


@pytest.mark.full
def test_a_summary_that_was_moved_away_is_made_again(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    made = lab.fit(folder, resume=True)
    before = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert made["val_loss"] == before["val_loss"]


def test_a_recipe_with_brackets_in_its_name_is_found_by_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.training.choose_folder import resumable

    monkeypatch.chdir(tmp_path)
    run = Path("runs/a[1]")
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    assert resumable("auto", None, "a[1]") == run
