"""SIGINT and SIGTERM save a checkpoint and end the run; a second one ends it at once."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lab import CommandResult, Lab, assert_same_run, forked, run_command_here
from tiers import first_by_default

from core.training import callbacks
from core.training.checkpoints import checkpoints_in
from core.training.module import TrainingModule


def run_with_signals(
    lab: Lab, run: Path, step: int, *signals: int, hook: Any = callbacks.LoadLog, name: str = ""
) -> CommandResult:
    """Trains in a forked process that sends itself signals when a hook is called for a step."""

    def work() -> None:
        function = getattr(hook, name or "on_train_batch_end")

        def sends_signals(self: Any, *args: Any) -> Any:
            module = self if isinstance(self, TrainingModule) else args[1]
            if module.windows_done == step:
                for signum in signals:
                    os.kill(os.getpid(), signum)
            return function(self, *args)

        setattr(hook, name or "on_train_batch_end", sends_signals)
        run_command_here("fit", lab.file, "--out", run)

    return forked(work)


@pytest.mark.parametrize("signum", first_by_default([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_saves_the_step_under_way_and_leaves(
    lab: Lab, finished: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    run = tmp_path / "run"
    result = run_with_signals(lab, run, 7, signum)
    assert result.code == 128 + signum
    assert (
        result.sentence
        == f"stopped by {signum.name} after step 7, which is saved; continue with --resume {run}"
    )
    assert checkpoints_in(run)[-1].name == "step-00000007.ckpt"
    assert not (run / "summary.json").exists()
    lab.fit(run, resume=True)
    assert_same_run(run, finished)


@pytest.mark.full
@pytest.mark.parametrize("step", [6, 12])
def test_a_signal_in_a_validation_waits_for_its_end(
    lab: Lab, finished: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    result = run_with_signals(
        lab, run, step, signal.SIGINT, hook=TrainingModule, name="validation_step"
    )
    assert result.code == 130
    assert checkpoints_in(run)[-1].name == f"step-{step:08d}.ckpt"
    lab.fit(run, resume=True)
    assert_same_run(run, finished)


@pytest.mark.full
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_run_at_once(
    lab: Lab, finished: Path, tmp_path: Path, first: int
) -> None:
    run = tmp_path / "run"
    result = run_with_signals(lab, run, 7, first, signal.SIGINT)
    assert result.code == 130
    assert checkpoints_in(run)[-1].name == "step-00000005.ckpt"
    lab.fit(run, resume=True)
    assert_same_run(run, finished)


@pytest.mark.parametrize("signum", first_by_default([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_before_the_first_step_leaves_nothing_that_blocks_a_second_try(
    lab: Lab, tmp_path: Path, signum: signal.Signals
) -> None:
    def work() -> None:
        import core.run.training

        core.run.training.build = lambda recipe, **_: os.kill(os.getpid(), signum)  # type: ignore[assignment]
        run_command_here("fit", lab.file, "--out", tmp_path / "run")

    result = forked(work)
    assert result.code == 128 + signum
    assert "Traceback" not in result.err
    assert lab.fit(tmp_path / "run", "budget.steps=1")["steps"] == 1


def test_afterwards_signals_mean_what_they_meant_before(lab: Lab, tmp_path: Path) -> None:
    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(signum) for signum in both]
    lab.fit(tmp_path / "run", "budget.steps=1")
    assert [signal.getsignal(signum) for signum in both] == before
