"""Whatever composition accepts trains: random recipes at toy width, drawn from the schemas of all components."""

import logging
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_recipes import RecipeDraw, write_fixed
from lab import Lab

import core.run.identity
import core.run.run_sample
import core.run.training
import plugins.fp8_native.precision
from core.contracts.errors import UserError
from core.generation.sample import sample
from core.recipe.compose import Recipe, compose
from core.recipe.model_schema import RESERVED_HEAD_NAMES
from core.run.environment import check_environment
from core.run.training import fit
from core.training.run_folder import RunFolder


@pytest.fixture
def fixed(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that every drawn recipe overrides; runs write short samples and try FP8 products once."""

    def short(*arguments: Any, tokens: int, **options: Any) -> Iterator[int]:
        return sample(*arguments, tokens=min(tokens, 2), **options)

    monkeypatch.setattr(core.run.run_sample, "sample", short)
    tried_once = cache(plugins.fp8_native.precision.missing)
    monkeypatch.setattr(plugins.fp8_native.precision, "missing", tried_once)
    # Looking up the commit and the packages takes 0.1 s a run.
    monkeypatch.setattr(core.run.identity, "provenance", lambda sections, **rest: rest)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield write_fixed(tmp_path)
    logger.setLevel(level)


def accepted(file: Path, overrides: list[str]) -> Recipe | None:
    """The recipe of a draw; None if composition or the check of the environment rejects it in a sentence."""
    try:
        recipe = compose(file, overrides)
        check_environment(recipe)
    except UserError:
        return None
    return recipe


def train_drawn(file: Path, seeds: Sequence[int]) -> None:
    """Draws recipes and trains those that are accepted for two steps each; at least half must be."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        overrides = RecipeDraw(seed).overrides()
        folder = file.parent / "run"
        try:
            recipe = accepted(file, overrides)
            if recipe is not None:
                summary = fit(recipe, RunFolder(folder), say=lambda _: None)
                assert summary["steps"] == 2
        except Exception as cause:
            raise AssertionError(f"draw {seed} failed: {overrides}") from cause
        outcomes["rejected" if recipe is None else "trained"] += 1
        shutil.rmtree(folder, ignore_errors=True)
    assert outcomes["trained"] >= len(seeds) / 2, outcomes


def test_what_is_accepted_trains(fixed: Path) -> None:
    train_drawn(fixed, range(40, 80))


@pytest.mark.full
def test_more_of_what_is_accepted_trains(fixed: Path) -> None:
    train_drawn(fixed, [*range(40), *range(80, 1040)])


def test_no_head_can_have_the_name_of_an_attribute_of_torchs_module_dict() -> None:
    public = {name for name in dir(torch.nn.ModuleDict()) if not name.startswith("_")}
    assert public <= RESERVED_HEAD_NAMES


def test_initial_weights_that_do_not_exist_are_found_before_the_corpus_is_read(
    lab: Lab, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        lab.fit(tmp_path / "run", f"initial_weights={tmp_path}/none", "data.corpus.paths=[none]")


def test_draws_repeat_and_differ() -> None:
    assert RecipeDraw(3).overrides() == RecipeDraw(3).overrides() != RecipeDraw(4).overrides()


@pytest.mark.parametrize("depth", [4, 6])
def test_more_depths_than_tokens_are_an_error_before_anything_runs(lab: Lab, depth: int) -> None:
    arguments = (lab.file, "data.sequence_length=4", f"model.heads.mtp.depth={depth}")
    for command, options in (("fit", ["--dry-run"]), ("fit", []), ("describe", [])):
        result = lab.command(command, *arguments, *options)
        assert result.code == 2
        assert result.sentence == (
            f"{lab.file}: model.heads.mtp.depth = {depth}: must be less than data.sequence_length = 4: "
            "depth k has sequence_length - k tokens to predict"
        )


def test_a_run_whose_last_step_ruined_the_weights_still_has_a_summary(
    lab: Lab, tmp_path: Path
) -> None:
    summary = lab.fit(tmp_path / "run", "budget.steps=1", "optimizer.lr=1e300", "loggers=[]")
    assert summary["steps"] == 1
    assert any("the model's logits are not finite" in notice for notice in summary["notices"])
    assert not (tmp_path / "run" / "sample.txt").exists()
