"""A rank that fails, hangs or is killed ends the run with one sentence; torchrun starts the ranks again."""

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lab import Lab, assert_same_run, rows
from real_processes import MARK, pids_with, started

from core.training.heartbeats import is_running

DDP = "strategy={name: ddp, ranks: 2, accelerator: cpu}"
FSDP = "strategy={name: fsdp, ranks: 2, accelerator: cpu}"
EXPERTS = "strategy={name: expert_parallel, expert_ranks: 2, accelerator: cpu}"
SECONDS = 240
"""Seconds within which a run has to end."""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
IN_RANK_1 = """\
import os

from core.extension.hookspec import hookimpl

CONTRACTS = "2.0"
if os.environ.get("LOCAL_RANK") == "1":
    {}


@hookimpl
def register(registry):
    pass
"""


def rank_1_of(mark: str) -> int:
    """The process of the second rank, as soon as there is one."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        found = pids_with(f"{MARK}={mark}", "LOCAL_RANK=1")
        if found:
            return min(found)
        time.sleep(0.01)
    raise AssertionError("no second rank")


def wait_for_rows(run: Path, count: int) -> None:
    """Waits until a run has logged some steps."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if (run / "metrics.csv").exists() and len(rows(run)) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("no step")


def fit(lab: Lab, run: Path, *arguments: str) -> list[str]:
    """The arguments of `python` for a run."""
    return ["-m", "core.fit", str(lab.file), *arguments, "--out", str(run)]


def the_sentence(err: str) -> str:
    """The only message of a run."""
    found = [line for line in err.splitlines() if line.startswith("moeloom: ")]
    assert len(found) == 1, err
    return found[0].removeprefix("moeloom: ")


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing has stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with started(fit(lab, run, DDP, "budget.steps=30"), run.parent) as (process, _):
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    return run


@pytest.mark.parametrize(
    ("statement", "quoted", "code"),
    [
        (
            "import no_such_module_of_rank_1",
            "plugin 'fails', which the recipe names, is broken: ",
            2,
        ),
        ("os._exit(3)", "", 3),
        ("os._exit(0)", "", 0),
    ],
)
def test_a_rank_that_fails_while_it_starts_is_named_with_its_log(
    lab: Lab, tmp_path: Path, statement: str, quoted: str, code: int
) -> None:
    (tmp_path / "fails.py").write_text(IN_RANK_1.format(statement))
    run = tmp_path / "run"
    with started(fit(lab, run, DDP, "plugins=[fails]"), tmp_path) as (process, _):
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, err
    sentence = the_sentence(err)
    assert f"ended with exit code {code} before the run was done, so the run ends" in sentence
    assert sentence.startswith("rank 1 (process ")
    assert sentence.endswith(f"; its log: {run}/logs/rank-00001.log")
    assert quoted in sentence
    assert "Traceback" not in err


def test_a_first_rank_that_hangs_ends_the_others(lab: Lab, tmp_path: Path) -> None:
    """The store of the signs of life is in its process, and does not answer any more."""
    run = tmp_path / "run"
    (tmp_path / "impatient.py").write_text(
        IN_RANK_1.format("import core.training.rank_watch as w; w.SILENCE_SECONDS = 4.0")
    )
    command = fit(lab, run, DDP, "budget.steps=5000", "plugins=[impatient]")
    with started(command, tmp_path) as (process, mark):
        other = rank_1_of(mark)
        wait_for_rows(run, 3)
        os.kill(process.pid, signal.SIGSTOP)
        until = time.monotonic() + 60
        while is_running(str(other)) and time.monotonic() < until:
            time.sleep(0.2)
        assert not is_running(str(other))
        process.kill()
        _, err = process.communicate(timeout=SECONDS)
    sentence = the_sentence(err)
    assert sentence.startswith(f"rank 0 (process {process.pid}) has given no sign of life for ")
    assert sentence.endswith(" s before the run was done, so rank 1 ends too")


def test_a_rank_that_leaves_without_an_error_ends_the_run(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "leaves.py").write_text(
        IN_RANK_1.format("__import__('threading').Timer(25, lambda: os._exit(0)).start()")
    )
    command = fit(lab, run, DDP, "budget.steps=50000", "plugins=[leaves]")
    with started(command, tmp_path) as (process, _):
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, err
    sentence = the_sentence(err)
    assert sentence.startswith("rank 1 (process ")
    assert sentence.endswith(
        f" before the run was done, so the run ends; its log: {run}/logs/rank-00001.log"
    )


def test_a_rank_that_hangs_ends_the_run(lab: Lab, tmp_path: Path) -> None:
    """SIGSTOP takes nothing away that another rank could notice, but the signs of life."""
    run = tmp_path / "run"
    (tmp_path / "impatient.py").write_text(
        "import runpy, core.training.rank_watch as watch\n"
        "watch.SILENCE_SECONDS = 4.0\n"
        "runpy.run_module('core.fit', run_name='__main__', alter_sys=True)\n"
    )
    command = ["impatient.py", *fit(lab, run, DDP, "budget.steps=5000")[2:]]
    with started(command, tmp_path) as (process, mark):
        stopped = rank_1_of(mark)
        wait_for_rows(run, 3)
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        _, err = process.communicate(timeout=SECONDS)
        assert time.monotonic() - began < 60
    assert process.returncode == 1, err
    sentence = the_sentence(err)
    assert sentence.startswith(f"rank 1 (process {stopped}) has given no sign of life for ")
    assert sentence.endswith(
        f" s before the run was done, so the run ends; its log: {run}/logs/rank-00001.log"
    )


def test_torchrun_starts_the_ranks_again_and_they_reach_the_same_bits(
    lab: Lab, whole: Path, tmp_path: Path
) -> None:
    """One command begins the run and continues it; the rank is killed after a checkpoint that is not the last."""
    run = tmp_path / "run"
    command = [*TORCHRUN, "--max-restarts=2", *fit(lab, run, DDP, "budget.steps=30")]
    with started([*command, "--resume", "auto"], tmp_path) as (process, mark):
        wait_for_rows(run, 9)
        killed = rank_1_of(mark)
        os.kill(killed, signal.SIGKILL)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    sentence = the_sentence(err).replace(f" (process {killed})", "")
    assert sentence == (
        f"rank 1 has ended before the run was done, so the run ends; its log: {run}/logs/rank-00001.log"
    )
    assert "(resumed after step " in err
    assert_same_run(run, whole)


@pytest.mark.parametrize("strategy", [FSDP, EXPERTS])
def test_torchrun_hands_its_signal_on_and_the_run_is_saved(
    lab: Lab, tmp_path: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    long = "budget.steps=5000"
    with started([*TORCHRUN, *fit(lab, run, strategy, long)], tmp_path) as (process, _):
        wait_for_rows(run, 7)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)
    assert the_sentence(err).startswith("stopped by SIGTERM after step ")
    step = int(the_sentence(err).split("step ")[1].split(",")[0])
    assert (run / "checkpoints" / f"step-{step:08d}.ckpt").exists()
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("strategy", [FSDP, EXPERTS])
def test_a_signal_to_the_first_rank_saves_and_exits_with_its_number(
    lab: Lab, tmp_path: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    with started(fit(lab, run, strategy, "budget.steps=5000"), tmp_path) as (process, _):
        wait_for_rows(run, 7)
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGUSR1, err
    step = int(the_sentence(err).split("step ")[1].split(",")[0])
    assert (run / "checkpoints" / f"step-{step:08d}.ckpt").exists()


def test_a_signal_while_the_ranks_meet_ends_the_one_that_waits(lab: Lab, tmp_path: Path) -> None:
    """It waits inside torch, where no handler of Python runs; torchrun would kill it after 30 seconds."""
    run = tmp_path / "run"
    task = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    program = (
        "import os, runpy; os.environ.update({}); "
        "runpy.run_module('core.fit', run_name='__main__', alter_sys=True)"
    )
    command = ["-c", program.format(task), *fit(lab, run, DDP)[2:]]
    with started(command, tmp_path) as (process, _):
        until = time.monotonic() + SECONDS
        while not is_listening(int(task["MASTER_PORT"])) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, err = process.communicate(timeout=SECONDS)
        assert time.monotonic() - began < 20
    assert process.returncode == 143, err
    assert the_sentence(err) == (
        "rank 0 has received SIGTERM while it waited for the 2 ranks to meet, and ends: "
        f"rank 1 has not come; it has no log at {run}/logs/rank-00001.log"
    )


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False
