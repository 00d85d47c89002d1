"""Checkpoints that are kept for good beside the latest, also over kills and resumes."""

import os
import signal
from pathlib import Path

import pytest
from lab import Lab, assert_same_run, checkpoint_names, forked

from core.contracts.errors import UserError
from core.training import callbacks

KEEP = (
    "checkpoint.every_steps=2",
    "checkpoint.keep=1",
    "checkpoint.keep_every_steps=4",
    "budget.steps=11",
)


def steps_of(run: Path) -> list[int]:
    """The steps whose checkpoints a run folder holds."""
    return [int(name[5:13]) for name in checkpoint_names(run) if name.startswith("step-")]


def test_every_fourth_step_is_kept_beside_the_latest(lab: Lab, tmp_path: Path) -> None:
    lab.fit(tmp_path / "run", *KEEP)
    assert steps_of(tmp_path / "run") == [4, 8, 11]


@pytest.mark.full
def test_without_the_key_only_the_latest_are_kept(lab: Lab, tmp_path: Path) -> None:
    lab.fit(tmp_path / "run", *KEEP[:2], "budget.steps=11")
    assert steps_of(tmp_path / "run") == [11]


@pytest.mark.full
@pytest.mark.parametrize("step", [3, 4, 5, 8, 9, 10])
@pytest.mark.parametrize("place", ["before the old are removed", "after"])
def test_a_kill_at_any_step_loses_none_that_is_kept(
    lab: Lab, tmp_path: Path, step: int, place: str
) -> None:
    run = tmp_path / "run"
    remove = callbacks.KeepLatest._remove_old

    def kill(self: callbacks.KeepLatest, trainer: object) -> None:
        newest = steps_of(run)[-1]
        if newest >= step and place != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        remove(self, trainer)  # type: ignore[arg-type]
        if newest >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        callbacks.KeepLatest._remove_old = kill  # type: ignore[method-assign]
        lab.fit(run, *KEEP)

    forked(work)
    newest = steps_of(run)[-1]
    kept = [n for n in (4, 8) if n <= newest]
    assert set(kept) <= set(steps_of(run))
    lab.fit(run, *KEEP, resume=True)
    assert steps_of(run) == [4, 8, 11]
    lab.fit(tmp_path / "whole", *KEEP)
    assert_same_run(run, tmp_path / "whole")


BAD = {
    "checkpoint.keep_every_steps=0": "keep_every_steps = 0: must be at least 1",
    "checkpoint.keep_every_steps=7": "keep_every_steps = 7: must be a multiple of checkpoint.every_steps = 5",
    "checkpoint={every_steps: null, keep_every_steps: 4}": "keep_every_steps = 4: must be null where "
    "checkpoint.every_steps is, because nothing is saved",
    "checkpoint.keep_every_steps=1.5": "keep_every_steps = 1.5: must be a whole number or null",
}


@pytest.mark.parametrize(("override", "sentence"), BAD.items())
def test_steps_that_are_never_saved_cannot_be_kept(lab: Lab, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as wrong:
        lab.recipe(override)
    assert str(wrong.value).endswith(f"checkpoint.{sentence}")
