"""A signal saves a checkpoint between two batches and ends the run; a second one ends it at once."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lab import (
    CommandResult,
    Lab,
    assert_same_run,
    forked,
    last_checkpoint,
    rows,
    run_command_here,
)
from tiers import first_by_default

from core.checkpoints.listing import checkpoints_in
from core.training import callbacks
from core.training.module import TrainingModule


def run_with_signals(
    lab: Lab,
    run: Path,
    step: int,
    *signals: int,
    hook: Any = callbacks.LoadLog,
    name: str = "",
    overrides: Sequence[str] = (),
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
        run_command_here("fit", lab.file, *overrides, "--out", run)

    return forked(work)


@pytest.fixture
def default_sighup() -> Iterator[None]:
    """SIGHUP has its default handler, also under `nohup pytest`, which ignores the signal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


STOPPING = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP]


@pytest.mark.usefixtures("default_sighup")
@pytest.mark.parametrize("signum", first_by_default(STOPPING))
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


@pytest.mark.parametrize("step", first_by_default([12, 6]))
def test_a_signal_in_a_validation_gives_it_up_and_the_resumed_run_repeats_it(
    lab: Lab, finished: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    result = run_with_signals(
        lab, run, step, signal.SIGTERM, hook=TrainingModule, name="validation_step"
    )
    assert result.code == 143
    assert checkpoints_in(run)[-1].name == f"step-{step:08d}.ckpt"
    last = [row for row in rows(run) if row["step"] == str(step)]
    assert len(last) == 1
    assert "val_loss" not in last[0]
    lab.fit(run, resume=True)
    assert_same_run(run, finished)
    assert not last_checkpoint(run)["moeloom"]["validation_pending"]


@pytest.mark.full
def test_a_final_validation_that_no_interval_asks_for_is_repeated_too(
    lab: Lab, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    seven = "budget.steps=7"
    result = run_with_signals(
        lab, run, 7, signal.SIGTERM, hook=TrainingModule, name="validation_step", overrides=[seven]
    )
    assert result.code == 143
    lab.fit(run, seven, resume=True)
    whole = tmp_path / "whole"
    lab.fit(whole, seven)
    assert_same_run(run, whole)


@pytest.mark.full
def test_a_kill_between_a_repeated_validation_and_its_checkpoint_leaves_no_row_twice(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_with_signals(lab, run, 6, signal.SIGTERM, hook=TrainingModule, name="validation_step")

    def killed() -> None:
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        callbacks.KeepLatest.step_ended = kill  # type: ignore[method-assign]
        lab.fit(run, resume=True)

    assert forked(killed).code == 137
    assert len([row for row in rows(run) if row["step"] == "6"]) == 2
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


@pytest.mark.parametrize(
    "signum", first_by_default([signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
)
def test_a_signal_before_the_first_step_leaves_nothing_that_blocks_a_second_try(
    lab: Lab, tmp_path: Path, signum: signal.Signals
) -> None:
    def work() -> None:
        import core.run.environment

        core.run.environment.build = lambda recipe, **_: os.kill(os.getpid(), signum)  # type: ignore[assignment]
        run_command_here("fit", lab.file, "--out", tmp_path / "run")

    result = forked(work)
    assert result.code == 128 + signum
    assert "Traceback" not in result.err
    assert lab.fit(tmp_path / "run", "budget.steps=1")["steps"] == 1


@pytest.mark.full
def test_afterwards_signals_mean_what_they_meant_before(lab: Lab, tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in STOPPING]
    lab.fit(tmp_path / "run", "budget.steps=1")
    assert [signal.getsignal(signum) for signum in STOPPING] == before


@pytest.mark.full
def test_a_signal_that_nohup_or_the_user_took_is_left_alone(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, lambda *_: print("mine", file=sys.stderr))
        result = run_with_signals(lab, tmp_path / "run", 7, signal.SIGHUP, signal.SIGUSR2)
        print(result.err, file=sys.stderr)
        sys.exit(result.code)

    result = forked(work)
    assert result.code == 0, result.err
    assert "mine" in result.err
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.full
def test_in_a_slurm_job_lightning_writes_nothing_and_requeues_nothing(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our handlers Lightning writes `hpc_ckpt_1.ckpt` into the run folder and calls scontrol."""
    called = tmp_path / "scontrol-was-called"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\ntouch {called}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    result = run_with_signals(lab, run, 7, signal.SIGUSR1)
    assert result.code == 128 + signal.SIGUSR1
    assert not called.exists()
    assert not list(run.rglob("hpc_ckpt*"))
    assert checkpoints_in(run)[-1].name == "step-00000007.ckpt"


SELF_SENT = "import os, signal\n\n{}"
KILL = "os.kill(os.getpid(), signal.{})"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("SIGTERM", KILL),
        ("SIGUSR1", KILL),
        ("SIGHUP", f"try:\n    {KILL}\nexcept BaseException:\n    raise ImportError('no')"),
    ],
)
def test_a_signal_while_a_plugin_is_imported_is_no_mistake_of_the_plugin(
    lab: Lab, tmp_path: Path, name: str, module: str
) -> None:
    (tmp_path / "gets_signal.py").write_text(SELF_SENT.format(module.format(name)))

    def work() -> None:
        # SIGHUP is ignored in what nohup starts, the tests included.
        signal.signal(signal.Signals[name], signal.SIG_DFL)
        sys.path.append(str(tmp_path))
        run_command_here("describe", lab.file, "plugins=[gets_signal]")

    result = forked(work)
    assert (result.code, result.out, result.err) == (128 + signal.Signals[name], "", "")
