"""Runs as processes of their own: their threads, what ends them, and what a runner that dies leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, Lab, rows

from core.contracts.errors import UserError
from core.study.child import NO_SPACE
from core.study.cores import cores
from core.study.runner import LocalPool, command_of, run_jobs
from core.study.sweep import run_sweep
from core.study.sweep_file import Variant, read_sweep
from core.study.sweep_folder import Job, Status, SweepFolder

from .conftest import TWO, ForkPool, Write
from .test_runner import kept, read, states

LONG = (
    TWO.replace("[3, 4]", "[3]").replace("steps: 2", "steps: 60")
    + "overrides: {{checkpoint.every_steps: 20}}\n"
)


def until(what: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def processes_of(folder: Path) -> list[int]:
    """The processes with a path in this folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def job(lab: Lab, tmp_path: Path) -> Job:
    """A run of the small recipe that is not begun."""
    path = tmp_path / "out" / "runs" / "bias" / "seed-3"
    path.mkdir(parents=True)
    return Job(Variant("bias", lab.recipe(), str(lab.file), ()), 3, path)


def of_two_ranks(lab: Lab, job: Job) -> Job:
    """The same by two processes."""
    recipe = lab.recipe("strategy.name=ddp", "strategy.ranks=2")
    return Job(Variant("two", recipe, str(lab.file), ()), 3, job.path)


def result(job: Job, slots: int, code: str) -> str:
    """What a run that is this Python code prints."""
    pool = LocalPool(slots, lambda *_: None)
    try:
        assert pool.submit(job, [sys.executable, "-c", code]).result(30)[0] == 0
    finally:
        pool.stop()
    return job.log.read_text(encoding="utf-8").strip()


THREADS = "import os; print(os.environ['OMP_NUM_THREADS'])"


@pytest.fixture(autouse=True)
def no_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This machine's container must not decide what a test finds."""
    monkeypatch.setattr("core.study.cores.QUOTA", tmp_path / "cpu.max")
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("cores", "slots", "expected"), [(8, 1, "8"), (8, 2, "4"), (8, 3, "2"), (2, 4, "1")]
)
def test_runs_share_the_cores(
    job: Job, monkeypatch: pytest.MonkeyPatch, cores: int, slots: int, expected: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert result(job, slots, THREADS) == expected


def test_the_threads_that_the_user_says(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not more than their share: several runs would take turns on every core."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert result(job, 2, THREADS) == "3"
    assert result(job, 4, THREADS).splitlines()[-1] == "2"


def test_the_tokenizer_has_no_more_threads_than_the_run(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert result(job, 1, "import os; print(os.environ['RAYON_NUM_THREADS'])") == "1"


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("300000 100000", 3),
        ("350000 100000", 3),
        ("50000 100000", 1),
        ("max 100000", 8),
        ("900000 100000", 8),
        ("", 8),
    ],
)
def test_a_containers_quota_is_all_there_is(
    no_quota: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    no_quota.write_text(quota + "\n", encoding="utf-8")
    assert cores() == expected


def test_the_ranks_of_a_run_share_its_part(
    lab: Lab, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert result(of_two_ranks(lab, job), 2, THREADS) == "2"


def test_a_run_that_is_begun_keeps_its_threads(job: Job) -> None:
    """A run with another number of threads could not be resumed: `--resume --workers 1` after `--workers 2`."""
    (job.path / "provenance.json").write_text('{"threads": 5}', encoding="utf-8")
    assert result(job, 1, THREADS) == "5"


def alone(job: Job, folder: SweepFolder) -> None:
    """Works on one run and reports nothing."""
    run_jobs(
        [job],
        folder,
        LocalPool(1, lambda *_: None),
        "val_loss",
        began=lambda _: None,
        ended=lambda *_: None,
    )


def test_a_run_is_alone_in_its_session(job: Job) -> None:
    """Ctrl-C at the terminal reaches the runner alone; from two signals a run would end without saving itself."""
    assert result(job, 1, "import os; print(os.getpid() == os.getsid(0))") == "True"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; print('step 7'); os.kill(os.getpid(), 9)", "killed by SIGKILL: step 7"),
        ("import os; os.kill(os.getpid(), 15)", "killed by SIGTERM: it printed nothing"),
        ("raise ValueError('no such thing')", "exit code 1: ValueError: no such thing"),
        (
            "print('moeloom: lr = x: no'); print('bye'); raise SystemExit(2)",
            "exit code 2: lr = x: no",
        ),
        ("raise SystemExit(0)", "exit code 0: it printed nothing"),
    ],
)
def test_how_a_run_ended(job: Job, monkeypatch: pytest.MonkeyPatch, code: str, reason: str) -> None:
    """What an earlier attempt said is not the reason."""
    monkeypatch.setattr("core.study.runner.command_of", lambda *_: [sys.executable, "-uc", code])
    job.log.write_text("moeloom: stopped by SIGTERM after step 3\n", encoding="utf-8")
    folder = SweepFolder(job.path.parents[2])
    folder.write_status(job, Status("failed", "something else", 100.0))
    alone(job, folder)
    status = folder.status(job)
    assert (status.state, status.reason) == ("failed", reason)
    assert 100 < status.seconds < 110


def test_a_run_that_diverged_has_failed_in_spite_of_its_summary(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock is finite, so it would count as done where a sweep compares speed."""
    (job.path / "summary.json").write_text('{"val_loss": 2.5}', encoding="utf-8")
    code = "print('moeloom: the run diverged: val_loss = nan'); raise SystemExit(1)"
    monkeypatch.setattr("core.study.runner.command_of", lambda *_: [sys.executable, "-uc", code])
    folder = SweepFolder(job.path.parents[2])
    alone(job, folder)
    status = folder.status(job)
    reason = "exit code 1: the run diverged: val_loss = nan"
    assert (status.state, status.reason) == ("failed", reason)


def test_what_does_not_end_is_killed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.study.runner.GRACE", 0.2)
    pool = LocalPool(1, lambda *_: None)
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    future = pool.submit(job, [sys.executable, "-c", stubborn])
    until(lambda: job.log.exists() and job.log.read_bytes())
    pool.stop()
    assert future.result(1)[0] == -signal.SIGKILL


def test_a_process_that_was_left_behind_is_ended_first(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one that works on this run: numbers are used again."""
    monkeypatch.setattr("core.study.runner.command_of", lambda *_: [sys.executable, "-c", ""])
    folder = SweepFolder(job.path.parents[2])
    sleep = [sys.executable, "-c", "import time; time.sleep(60)", "core.fit"]
    with subprocess.Popen([*sleep, str(job.path)]) as left, subprocess.Popen(sleep) as other:
        for process in (left, other):
            until(
                lambda process=process: (
                    b"time.sleep" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
                )
            )
            folder.write_status(job, Status("running", process=process.pid))
            run_jobs(
                [job],
                folder,
                LocalPool(1, lambda *_: None),
                "val_loss",
                began=lambda _: None,
                ended=lambda *_: None,
            )
        assert left.wait(5) == -signal.SIGTERM
        assert other.poll() is None
        other.kill()


def test_the_command_of_a_run(job: Job) -> None:
    folder = SweepFolder(job.path.parents[2])
    begin = command_of(job, folder)
    assert begin[1:4] == ["-m", "core.study.child", str(folder.path / "recipes" / "bias.yaml")]
    assert begin[4:] == ["trainer.enable_progress_bar=false", "seed=3", "--out", str(job.path)]
    (job.path / "recipe.yaml").touch()
    assert command_of(job, folder)[-2:] == ["--resume", str(job.path)]


def test_a_run_whose_runner_dies_is_reported_once(tmp_path: Path) -> None:
    """However often the kernel says so: a second SIGTERM would end a run before it is saved."""
    (tmp_path / "core").mkdir()
    for name in ("core/__init__.py", "core/study/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "core/study/child.py").write_text(
        (ROOT / "core/study/child.py").read_text(), encoding="utf-8"
    )
    (tmp_path / "core/fit.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('stopped'))\n"
        "for _ in range(3):\n    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print(__name__, *sys.argv[1:])\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "core.study.child", "recipe"]
    done = subprocess.run(
        command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines() == ["stopped", "__main__ recipe"]


@pytest.mark.parametrize(
    ("number", "code"), [("ENOSPC", "NO_SPACE"), ("EDQUOT", "NO_SPACE"), ("EACCES", "2")]
)
def test_a_run_that_finds_no_space_has_an_exit_code_of_its_own(
    tmp_path: Path, number: str, code: str
) -> None:
    """A command leaves with SystemExit(2) while the cause of its error message is an OSError."""
    program = (
        "import errno\nfrom core.study.child import NO_SPACE, exit_on_full_disk\n"
        "from core.contracts.errors import UserError\nfrom core.command import leave\n"
        "with exit_on_full_disk():\n    try:\n        try:\n"
        f"            raise OSError(errno.{number}, 'no')\n"
        "        except OSError as cause:\n            raise UserError('it says so') from cause\n"
        "    except UserError as error:\n        leave(2, str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == "moeloom: it says so\n"
    assert done.returncode == (NO_SPACE if code == "NO_SPACE" else int(code))


class Once(ForkPool):
    """One run, and then Ctrl-C."""

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """The first."""
        if self.commands:
            raise KeyboardInterrupt
        return super().submit(job, command)


class Runner:
    """`python -m core.sweep` as a user starts it: in a process group of its own, as a terminal makes it."""

    def __init__(self, file: Path, out: Path, *more: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "core.sweep", str(file), "--out", str(out), *more]
        self.out = out
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a job in a shell's background ignores it
        try:
            self.process = subprocess.Popen(
                command, env=environment, start_new_session=True, **pipes
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def end(self, seconds: float = 120.0) -> tuple[int, str, str]:
        """Its exit code and what it printed."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def step(self, name: str) -> int:
        """How far a run is."""
        file = self.out / "runs" / name
        return len(rows(file)) if (file / "metrics.csv").exists() else 0


def test_a_killed_runner_takes_its_runs_along_and_the_next_goes_on(
    lab: Lab, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, out = write(LONG), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("core.study.sweep._pool", lambda *_: Once())
        with pytest.raises(KeyboardInterrupt):
            run_sweep(read_sweep(file), out)
    first = Runner(file, out, "--resume")
    until(lambda: first.step("none/seed-3") > 3)
    with pytest.raises(
        UserError, match=rf"another runner \(process {first.process.pid}\) works in this folder"
    ):
        run_sweep(read_sweep(file), out, resume=True)
    process = read(out / "runs/none/seed-3/status.json")["process"]
    assert process in processes_of(out)
    assert processes_of(out).count(process) == 1
    first.process.kill()
    assert first.end()[0] == -signal.SIGKILL
    until(lambda: not processes_of(out))
    assert states(out) == {"bias/seed-3": "done", "none/seed-3": "running"}
    before = {path: content for path, content in kept(out).items() if "bias" in path.parts}

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    result = lab.command("sweep", file, "--out", out, "--resume", "--json", "--workers", "2")
    assert result.code == 0, result.err
    results: Any = json.loads(result.out)
    assert results == read(out / "results.json")
    assert [row["n"] for row in results["rows"]] == [1, 1]
    assert {path: content for path, content in kept(out).items() if "bias" in path.parts} == before
    log = (out / "runs/none/seed-3/log.txt").read_text(encoding="utf-8")
    assert log.count("moeloom: stopped by SIGTERM after step ") == 1, (
        "it was ended before it could save itself"
    )
    assert log.count("(resumed after step ") == 1
    summary = read(out / "runs/none/seed-3/summary.json")
    assert (summary["steps"], summary["threads"]) == (60, 1)
    assert not processes_of(out)


def test_an_interrupt_saves_what_is_under_way(write: Write, tmp_path: Path) -> None:
    """Ctrl-C at a terminal sends the signal to the runner's whole process group."""
    text = LONG.replace("every_steps: 20", "every_steps: 1000").replace("steps: 60", "steps: 2000")
    file, out = write(text), tmp_path / "out"
    runner = Runner(file, out)
    until(lambda: runner.step("bias/seed-3") > 3)
    os.killpg(runner.process.pid, signal.SIGINT)
    code, _, err = runner.end()
    assert code == 130
    last = err.splitlines()[-1]
    assert last.startswith(f"moeloom: interrupted; what is done is kept in {out}: ")
    assert "--resume goes on" in last
    assert "Traceback" not in err
    assert states(out) == {"bias/seed-3": "waiting"}
    run = out / "runs/bias/seed-3"
    assert list((run / "checkpoints").glob("*.ckpt")), "nothing was saved"
    assert "stopped by SIGTERM after step" in (run / "log.txt").read_text(encoding="utf-8")
    assert not processes_of(out)
