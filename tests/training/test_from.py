"""Runs that continue another one in a folder of their own: `fit --from RUN`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, last_checkpoint, rows
from observed_run import differences
from rank_runs import assert_same_end, cut_after, fit_on_ranks

from core.checkpoints.listing import checkpoints_in
from core.contracts.errors import UserError
from core.run.training import fit
from core.storage.digests import digest_of
from core.training.run_folder import RunFolder

ALL = ("checkpoint.keep=9", "checkpoint.every_steps=3")
EMA = "callbacks=[{name: ema, decay: 0.9}]"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def parent(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that is complete."""
    run = tmp_path_factory.mktemp("runs") / "parent"
    lab.fit(run, *ALL, EMA, "budget.steps=6")
    return run


@pytest.fixture(scope="module")
def longer(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, of 9 steps."""
    run = tmp_path_factory.mktemp("runs") / "longer"
    lab.fit(run, *ALL, EMA, "budget.steps=9")
    return run


def continued(
    lab: Lab, parent: Path, run: Path, *overrides: str, resume: bool = False, say: Any = None
) -> dict[str, Any]:
    recipe = lab.recipe(*ALL, *overrides)
    say = say or (lambda _: None)
    return fit(recipe, RunFolder(run), parent=parent, resume=resume, say=say)


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = last_checkpoint(one), last_checkpoint(other)
    for part in ("state_dict", "optimizer_states", "averages"):
        assert not differences(first[part], second[part])


def values_of(run: Path, after: int) -> list[dict[str, str]]:
    """The rows of a log after a step, without what depends on the clock."""
    found = []
    for row in rows(run):
        if int(row["step"]) > after:
            found.append({k: v for k, v in row.items() if k not in ("mfu", "tokens_per_second")})
    return found


def test_a_longer_run_is_the_one_that_was_longer_from_the_start(
    lab: Lab, parent: Path, longer: Path, tmp_path: Path
) -> None:
    before = {file: digest_of(file) for file in parent.rglob("*") if file.is_file()}
    said: list[str] = []
    summary = continued(lab, parent, tmp_path / "run", EMA, "budget.steps=9", say=said.append)
    assert_same_bits(tmp_path / "run", longer)
    assert values_of(tmp_path / "run", 0) == values_of(longer, 6)
    assert summary["steps"] == 9
    assert summary["val_loss"] == json.loads((longer / "summary.json").read_text())["val_loss"]
    assert f"continues {parent} after step 6, with its moments" in said
    checkpoint = checkpoints_in(parent)[-1]
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["parent"] == {
        "run": str(parent),
        "checkpoint": str(checkpoint),
        "step": 6,
        "sha256": digest_of(checkpoint),
    }
    assert {file: digest_of(file) for file in parent.rglob("*") if file.is_file()} == before


@pytest.mark.full
def test_with_nothing_changed_it_is_the_resumed_run(lab: Lab, longer: Path, tmp_path: Path) -> None:
    cut = cut_after(longer, 3, tmp_path / "cut")
    continued(lab, cut, tmp_path / "run", EMA, "budget.steps=9")
    lab.fit(cut, *ALL, EMA, "budget.steps=9", resume=True)
    assert_same_bits(tmp_path / "run", cut)
    assert values_of(tmp_path / "run", 0) == values_of(cut, 3)


def test_the_optimizers_settings_are_the_new_ones_and_moments_are_kept(
    lab: Lab, parent: Path, tmp_path: Path
) -> None:
    """At a learning rate of 0 only the moments move: by their new decays, from the parent's values."""
    settings = "optimizer={name: adamw, lr: 0.0, betas: [0.5, 0.75], weight_decay: 0.7}"
    continued(lab, parent, tmp_path / "run", settings, "budget.steps=7", EMA)
    before, after = last_checkpoint(parent), last_checkpoint(tmp_path / "run")
    for name, tensor in before["state_dict"].items():
        if not name.endswith(".bias"):
            assert torch.equal(tensor, after["state_dict"][name]), name
    groups = after["optimizer_states"][0]["param_groups"]
    assert [(group["betas"], group["weight_decay"]) for group in groups] == [
        ((0.5, 0.75), 0.7),
        ((0.5, 0.75), 0.0),
    ]
    for index, state in before["optimizer_states"][0]["state"].items():
        now = after["optimizer_states"][0]["state"][index]
        assert now["step"] == state["step"] + 1
        gradient = (now["exp_avg"] - 0.5 * state["exp_avg"]) / 0.5
        expected = 0.75 * state["exp_avg_sq"] + 0.25 * gradient**2
        torch.testing.assert_close(now["exp_avg_sq"], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.full
def test_a_run_that_is_killed_before_its_first_checkpoint_begins_at_its_parent_again(
    lab: Lab, parent: Path, longer: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    continued(lab, parent, run, EMA, "budget.steps=9")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "summary.json").unlink()
    lab.fit(run, *ALL, EMA, "budget.steps=9", resume=True)
    assert_same_bits(run, longer)
    assert values_of(run, 0) == values_of(longer, 6)


@pytest.mark.full
def test_a_changed_parent_is_found_before_the_run_begins_again(
    lab: Lab, parent: Path, tmp_path: Path
) -> None:
    own = tmp_path / "parent"
    shutil.copytree(parent, own)
    run = tmp_path / "run"
    continued(lab, own, run, EMA, "budget.steps=7")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "summary.json").unlink()
    last = checkpoints_in(own)[-1]
    with last.open("ab") as file:
        file.write(b"0")
    with pytest.raises(UserError, match=r"from which the run began, has changed; start it again"):
        lab.fit(run, *ALL, EMA, "budget.steps=7", resume=True)
    last.unlink()
    with pytest.raises(UserError, match=r"from which the run began, is gone; start it again"):
        lab.fit(run, *ALL, EMA, "budget.steps=7", resume=True)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("budget.steps=6",), "budget: 6 steps in all, and 6 are done"),
        (
            ("model.init.std=0.2",),
            r"model\.init\.std = 0\.2 here, and 0\.1 there: a run with --from",
        ),
        (("seed=4",), "seed = 4 here, and 3 there"),
        (("batch.sequences=8",), r"batch\.sequences = 8 here, and 4 there"),
        (("freeze=[router]",), r"freeze.* here, and .* there"),
        (
            ("optimizer={name: muon, lr: 0.1, weight_decay: 0.1}",),
            r"optimizer\.name = muon here, and adamw there",
        ),
    ],
)
def test_what_may_not_change_is_named(
    lab: Lab, parent: Path, tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        continued(lab, parent, tmp_path / "run", EMA, "budget.steps=9", *overrides)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_other_data_are_named(lab: Lab, parent: Path, tmp_path: Path) -> None:
    other = Lab(tmp_path)
    (other.texts / "doc-03.txt").write_text("other words", encoding="utf-8")
    with pytest.raises(UserError, match=r"doc-03\.txt"):
        continued(other, parent, tmp_path / "run", EMA, "budget.steps=9")


@pytest.mark.full
def test_the_command_takes_a_run_or_a_checkpoint(
    lab: Lab, parent: Path, longer: Path, tmp_path: Path
) -> None:
    given = (lab.file, *ALL, EMA, "budget.steps=9", "--out", tmp_path / "run", "--from")
    done = lab.command("fit", *given, checkpoints_in(parent)[0])
    assert done.code == 0, done.err
    assert "after step 3, with its moments" in done.out + done.err
    assert_same_bits(tmp_path / "run", longer)
    wrong = lab.command("fit", lab.file, "--from", tmp_path / "none")
    assert (wrong.code, wrong.sentence) == (
        2,
        f"--from {tmp_path / 'none'}: no checkpoint here: give a run folder or a checkpoint file",
    )
    both = lab.command("fit", lab.file, "--from", parent, "--resume", parent)
    assert "begins a new run, and --resume" in both.sentence


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy",
    [
        "strategy={name: ddp, ranks: 2}",
        "strategy={name: fsdp, ranks: 2}",
        "strategy={name: expert_parallel, expert_ranks: 2}",
    ],
    ids=["ddp", "fsdp", "expert_parallel"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ranks_continue_what_one_process_began_and_back(
    lab: Lab, tmp_path: Path, strategy: str, optimizer: str
) -> None:
    """A run of one process is continued by two ranks, and theirs by one process."""
    keys = ("precision.name=fp64", *ALL, EMA)
    slow = f"optimizer={{name: {optimizer}, lr: 0.001}}"
    fast = f"optimizer={{name: {optimizer}, lr: 0.01}}"
    lab.fit(tmp_path / "one", *keys, fast, "budget.steps=3")
    continued(lab, tmp_path / "one", tmp_path / "two", *keys, slow, "budget.steps=6")
    continued(lab, tmp_path / "two", tmp_path / "three", *keys, fast, "budget.steps=9")
    fit_on_ranks(
        lab, tmp_path / "ranks", *keys, slow, "budget.steps=6", strategy, parent=tmp_path / "one"
    )
    assert_same_end(tmp_path / "two", tmp_path / "ranks")
    continued(lab, tmp_path / "ranks", tmp_path / "back", *keys, fast, "budget.steps=9")
    assert_same_end(tmp_path / "three", tmp_path / "back")
