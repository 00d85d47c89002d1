"""Weights, predictions and scores that are not finite end a command with one sentence that names them."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab

import core
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.contracts.errors import NotFiniteError
from core.generation.sample import sample
from core.model.language_model import Decoded, LanguageModel
from core.reports.study_files import read
from core.run.divergence import divergence_in
from core.run.summary import divergence
from core.run.training import fit
from core.training.run_folder import RunFolder

WEIGHT = "blocks.1.ffn.routed.down.weight"


def changed(run: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copies a run, with its newest checkpoint changed and without its summary."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("summary.json"))
    file = checkpoints_in(folder)[-1]
    content = read_checkpoint(file)
    change(content)
    torch.save(content, file)
    return folder


def spoil_weight(value: float) -> Callable[[dict[str, Any]], None]:
    """Puts a value into one expert's weight."""

    def change(content: dict[str, Any]) -> None:
        content["state_dict"][f"model.{WEIGHT}"][1, 2, 3] = value

    return change


@pytest.fixture(scope="module")
def spoilt(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a NaN in one expert's weight."""
    return changed(finished, tmp_path_factory.mktemp("spoilt") / "run", spoil_weight(math.nan))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loading_names_the_first_weight_that_is_not_finite(
    finished: Path, tmp_path: Path, value: float
) -> None:
    run = changed(finished, tmp_path / "run", spoil_weight(value))
    named = rf"step-00000012\.ckpt: tensor {WEIGHT} holds a number that is not finite \({value} at "
    with pytest.raises(NotFiniteError, match=named + r"\[1, 2, 3\]\)"):
        core.load(run)


def test_every_reader_of_a_run_names_it(lab: Lab, spoilt: Path, tmp_path: Path) -> None:
    commands = [
        ("generate", spoilt, "--prompt", "a"),
        ("evaluate", spoilt),
        ("fit", lab.file, f"initial_weights={spoilt}", "--out", tmp_path / "new"),
        ("fit", lab.file, "--resume", spoilt),
    ]
    for name, *arguments in commands:
        result = lab.command(name, *arguments)
        assert result.code == 2, result.err
        assert f"{WEIGHT} holds a number that is not finite (nan at [1, 2, 3])" in result.sentence
        assert str(spoilt / "checkpoints") in result.sentence
    assert not (tmp_path / "new/recipe.yaml").exists()


@pytest.mark.parametrize("what", ["first moment", "rate"])
def test_what_the_next_update_adds_must_be_finite(
    finished: Path, tmp_path: Path, what: str
) -> None:
    from core.training.resume import newest
    from core.training.run_folder import RunFolder

    def spoil(content: dict[str, Any]) -> None:
        optimizer = content["optimizer_states"][0]
        if what == "rate":
            optimizer["param_groups"][0]["lr"] = math.nan
        else:
            optimizer["state"][4]["exp_avg"].view(-1)[0] = math.inf

    run = changed(finished, tmp_path / "run", spoil)
    found = "optimizer 0 has (lr = nan|an infinity in exp_avg of parameter 4)"
    with pytest.raises(NotFiniteError, match=found):
        newest(RunFolder(run))


def test_a_second_moment_may_be_infinite_and_not_nan(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    from core.training.resume import newest
    from core.training.run_folder import RunFolder

    def spoil(value: float) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            content["optimizer_states"][0]["state"][4]["exp_avg_sq"].view(-1)[0] = value

        return change

    run = changed(finished, tmp_path / "inf", spoil(math.inf))
    resumed = newest(RunFolder(run))
    assert resumed is not None
    assert resumed.step == 12
    run = changed(finished, tmp_path / "nan", spoil(math.nan))
    with pytest.raises(NotFiniteError, match=r"optimizer 0 has a NaN in exp_avg_sq of parameter 4"):
        newest(RunFolder(run))


def overflow(content: dict[str, Any]) -> None:
    """Makes weights finite and so large that every prediction overflows."""
    content["state_dict"]["model.output.weight"].fill_(3e38)
    content["state_dict"]["model.norm.weight"].fill_(3e38)


def test_predictions_and_scores_that_overflow_are_no_text_and_no_score(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    run = changed(finished, tmp_path / "run", overflow)
    result = lab.command("generate", run, "--prompt", "a")
    assert result.code == 2, result.err
    assert (
        f"{run}/checkpoints/step-00000012.ckpt: the model's logits are not finite"
        in result.sentence
    )
    result = lab.command("generate", run, "--prompt", "a", "--temperature", "1")
    assert result.code == 2, result.err
    result = lab.command("evaluate", run)
    assert result.code == 2, result.err
    assert "step-00000012.ckpt: val_loss = " in result.sentence


def test_sampling_rejects_one_logit_that_is_not_finite(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = core.load(finished)
    read = LanguageModel.read

    def spoiled(self: LanguageModel, *arguments: Any, **rest: Any) -> Decoded:
        decoded = read(self, *arguments, **rest)
        decoded.logits_BLV[..., 7] = -math.inf
        return decoded

    monkeypatch.setattr(LanguageModel, "read", spoiled)
    with pytest.raises(NotFiniteError, match=r"logits are not finite \(-inf for token 7\)"):
        next(sample(model, [0], tokens=1))


def test_a_run_that_diverges_has_a_summary_and_its_last_sentence_says_so(
    lab: Lab, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    steps = ("optimizer.lr=1e20", "budget.steps=3")
    result = lab.command("fit", lab.file, *steps, "--out", run)
    assert result.code == 1, result.err
    assert result.sentence.startswith("the run diverged: the training loss is nan since step 2, ")
    assert "val_loss = nan" in result.sentence
    assert "try a lower optimizer.lr" in result.sentence
    assert result.err.splitlines()[-1] == f"moeloom: {result.sentence}"
    (line,) = result.out.splitlines()
    assert "wall_seconds" in line
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3
    assert (summary["val_loss"], summary["val_bits_per_byte"]) == (None, None)
    assert summary["mtp_acceptance"] is None
    assert summary["notices"] == [result.sentence]
    assert not (run / "sample.txt").exists()
    again = lab.command("fit", lab.file, *steps, "--resume", run, "--json")
    assert (again.code, again.sentence) == (1, result.sentence)
    assert json.loads(again.out) == summary
    assert divergence_in(fit(lab.recipe(*steps), RunFolder(run), resume=True)) == result.sentence
    (row,) = read(run).runs
    assert (row.state, row.reason) == ("failed", result.sentence)


def test_a_sound_run_did_not_diverge(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert divergence_in(summary) is None
    assert (finished / "sample.txt").exists()


def test_without_a_validation_the_last_loss_decides(lab: Lab) -> None:
    module = lab.train("budget.steps=2", "optimizer.lr=1e20")
    module.validated = {}
    sentence = divergence(module, None, module.weight_not_finite())
    assert sentence is not None
    assert "the training loss is nan since step 2; try" in sentence
    module.validated = {"val_loss": 2.0}
    assert divergence(module, None, module.weight_not_finite()) is None
    with torch.no_grad():
        module.model.norm.weight[3] = math.inf
    sentence = divergence(module, None, module.weight_not_finite())
    assert sentence is not None
    assert "tensor norm.weight holds a number that is not finite (inf at [3])" in sentence
