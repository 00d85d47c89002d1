"""Ranks are started by the first one, by torchrun or by srun; where one dies, the others end with one sentence."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import srun_task
from lab import ROOT, Lab, rows

from core.contracts.strategy import StrategyFactory
from core.training.launchers import FIRST_RANK, launch_of

TWO = "strategy={name: ddp, ranks: 2, accelerator: cpu}"
LOOPBACK = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
BOUND = 60.0
"""Seconds within which a rank ends after another one."""


@contextmanager
def started(
    command: list[str], folder: Path, variables: Mapping[str, str] = LOOPBACK
) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, of which nothing is left behind."""
    environment = {**os.environ, **LOOPBACK, **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, env=environment, cwd=folder, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def fit(lab: Lab, run: Path, *arguments: str) -> list[str]:
    """The arguments of `python` for a run with two ranks."""
    return ["-m", "core.fit", str(lab.file), TWO, *arguments, "--out", str(run), "--json"]


def child_of(pid: int) -> int:
    """The rank that a process has started, as soon as there is one."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                first = f"{FIRST_RANK}={pid}\0".encode()
                if first in (process / "environ").read_bytes():
                    return int(process.name)
        time.sleep(0.01)
    raise AssertionError(f"process {pid} started no other")


def has_ended(pid: int) -> bool:
    """Whether a process is soon gone, or waits only for somebody to ask how it ended."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def wait_for_rows(run: Path) -> None:
    """Waits until a run has logged two steps."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        if (run / "metrics.csv").exists() and len(rows(run)) >= 2:
            return
        time.sleep(0.01)
    raise AssertionError("no step")


@pytest.mark.parametrize("while_training", [False, True])
def test_rank_1_ends_when_rank_0_is_killed(lab: Lab, tmp_path: Path, while_training: bool) -> None:
    run = tmp_path / "run"
    long = "budget.steps=5000"
    with started([sys.executable, *fit(lab, run, long)], tmp_path) as process:
        child = child_of(process.pid)
        if while_training:
            wait_for_rows(run)
        process.kill()
        began = time.monotonic()
        # The pipes are open for as long as the second rank lives.
        _, err = process.communicate(timeout=180)
        assert time.monotonic() - began < BOUND
    assert has_ended(child)
    log = (run / "logs" / "rank-00001.log").read_text()
    sentence = (
        f"moeloom: rank 0 (process {process.pid}) ended before the run was done, so rank 1 ends too"
    )
    # Before it has read its environment, rank 1 only finds that its parent is another process.
    early = "is not the process that started this one"
    assert log.count("moeloom: ") == 1
    if while_training or early not in log:
        assert err.count("moeloom: ") == 1
        assert sentence in err
        assert sentence in log
    assert "Traceback" not in err + log


@pytest.mark.parametrize("while_training", [False, True])
def test_rank_0_ends_when_rank_1_is_killed(lab: Lab, tmp_path: Path, while_training: bool) -> None:
    run = tmp_path / "run"
    long = "budget.steps=5000"
    with started([sys.executable, *fit(lab, run, long)], tmp_path) as process:
        child = child_of(process.pid)
        if while_training:
            wait_for_rows(run)
        os.kill(child, signal.SIGKILL)
        began = time.monotonic()
        _, err = process.communicate(timeout=180)
        assert time.monotonic() - began < BOUND
    assert process.returncode == 1
    sentence = (
        f"moeloom: rank 1 (process {child}) was ended by SIGKILL before the run was done, so the run ends; "
        f"its log: {run}/logs/rank-00001.log\n"
    )
    assert err.count("moeloom: ") == 1
    assert sentence in err
    assert "Traceback" not in err


def job_with_a_free_port() -> str:
    """A number of a SLURM job whose tasks meet at a port that nobody uses; they derive it from the number."""
    draw = random.Random()
    for _ in range(100):
        job = str(draw.randrange(1, 10**6))
        strategy = SimpleNamespace(component=StrategyFactory, config=SimpleNamespace(ranks=2))
        port = launch_of(strategy, srun_task(0, job)).port
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return job
    raise AssertionError("no port is free")


def test_a_rank_that_nobody_joins_ends(lab: Lab, tmp_path: Path) -> None:
    """The second task of srun does not come."""
    program = (
        "import runpy, sys, core.training.rank_watch as ranks; ranks.RENDEZVOUS_TIMEOUT = 3.0; "
        "runpy.run_module('core.fit', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", program, *fit(lab, tmp_path / "run")[2:]]
    with started(command, tmp_path, srun_task(0, job_with_a_free_port())) as process:
        _, err = process.communicate(timeout=180)
    assert process.returncode == 1, err
    log = tmp_path / "run" / "logs" / "rank-00001.log"
    sentence = (
        "moeloom: rank 0 has waited 3 s for the 2 ranks to meet, and ends: rank 1 has not come; "
    )
    assert f"{sentence}it has no log at {log}\n" in err


def test_two_tasks_of_srun_are_the_ranks(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, *fit(lab, run)]
    job = job_with_a_free_port()
    first, second = srun_task(0, job), srun_task(1, job)
    with started(command, tmp_path, first) as one, started(command, tmp_path, second) as two:
        out, err = one.communicate(timeout=240)
        other_out, other_err = two.communicate(timeout=60)
    assert one.returncode == 0, err
    assert two.returncode == 0, other_err
    assert json.loads(out) == json.loads((run / "summary.json").read_text())
    assert other_out == ""
    assert len(rows(run)) == 12 + 2


def test_two_tasks_of_torchrun_are_the_ranks(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with started([sys.executable, *torchrun, *fit(lab, run)], tmp_path) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out) == json.loads((run / "summary.json").read_text())
    assert len(rows(run)) == 12 + 2


def test_one_task_of_a_launcher_starts_the_ranks(lab: Lab, tmp_path: Path) -> None:
    """Variables of one task used to make a world of one, reported as that of two ranks."""
    run = tmp_path / "run"
    one = {**srun_task(0), "SLURM_NTASKS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with started([sys.executable, *fit(lab, run)], tmp_path, one) as process:
        child_of(process.pid)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out) == json.loads((run / "summary.json").read_text())
