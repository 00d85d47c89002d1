"""Two nodes, played on one machine, train as one node with two ranks does; where one ends, the other does too."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import ROOT, Lab, assert_same_run, rows
from real_processes import started

import core

ONE_NODE = "strategy={name: ddp, ranks: 2, accelerator: cpu}"
TWO_NODES = "strategy={name: ddp, ranks: 2, nodes: 2, accelerator: cpu}"
SECONDS = 240
"""Seconds within which a run has to end."""


def fit(lab: Lab, run: Path, *arguments: str) -> list[str]:
    """The arguments of `python` for a run on two nodes."""
    return ["-m", "core.fit", str(lab.file), TWO_NODES, *arguments, "--out", str(run), "--json"]


def srun(node: int) -> dict[str, str]:
    """The environment of the only task of a node."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(node),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(node),
        "SLURM_NNODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "localhost,elsewhere",
    }


def torchrun(node: int, port: int) -> list[str]:
    """The beginning of the command of an agent with one worker."""
    return [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        f"--node-rank={node}",
        "--nproc-per-node=1",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
    ]


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def both_nodes(
    lab: Lab, run: Path, launcher: str, *arguments: str
) -> Iterator[list["subprocess.Popen[str]"]]:
    """The processes that two nodes run for a launcher."""
    port = free_port()
    with ExitStack() as stack:
        processes = []
        for node in range(2):
            command = fit(lab, run, *arguments)
            variables = {}
            if launcher == "torchrun":
                command = [*torchrun(node, port), *command]
            else:
                variables = srun(node)
            process, _ = stack.enter_context(started(command, run.parent, variables))
            processes.append(process)
        yield processes


@pytest.fixture(scope="module")
def one_node(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks on one node."""
    run = tmp_path_factory.mktemp("one") / "run"
    command = ["-m", "core.fit", str(lab.file), ONE_NODE, "--out", str(run)]
    with started(command, run.parent) as (process, _):
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    return run


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_nodes_reach_the_bits_of_one(
    lab: Lab, one_node: Path, tmp_path: Path, launcher: str
) -> None:
    """Losses, weights, loads and checkpoints in one folder, written and printed by the first node alone."""
    run = tmp_path / "run"
    with both_nodes(lab, run, launcher) as (first, second):
        out, err = first.communicate(timeout=SECONDS)
        other_out, other_err = second.communicate(timeout=SECONDS)
    assert first.returncode == 0, err
    assert second.returncode == 0, other_err
    assert other_out == ""
    assert json.loads(out) == json.loads((run / "summary.json").read_text())
    assert_same_run(run, one_node)


def test_a_node_that_does_not_see_the_run_folder_starts_no_training(
    lab: Lab, one_node: Path, tmp_path: Path
) -> None:
    """Without a shared file system the second node would begin at the first step while the first one continues."""
    run = tmp_path / "run"
    with both_nodes(lab, run, "srun", "budget.steps=5000") as (first, second):
        wait_for_rows(run, 7)
        first.send_signal(signal.SIGTERM)
        _, err = first.communicate(timeout=SECONDS)
        second.communicate(timeout=SECONDS)
    assert first.returncode == 143, err
    (tmp_path / "elsewhere").mkdir()
    continued = [*fit(lab, run, "budget.steps=5000"), "--resume", "auto"]
    elsewhere = [*fit(lab, tmp_path / "elsewhere", "budget.steps=5000"), "--resume", "auto"]
    with (
        started(continued, tmp_path, srun(0)) as (first, _),
        started(elsewhere, tmp_path, srun(1)) as (second, _),
    ):
        _, err = first.communicate(timeout=SECONDS)
        _, other_err = second.communicate(timeout=SECONDS)
    assert (first.returncode, second.returncode) == (2, 2), err
    assert other_err == ""
    log = (tmp_path / "elsewhere" / "logs" / "rank-00001.log").read_text()
    for printed in (err, log):
        assert "rank 1 on node 1 would continue after step 0, and rank 0 after step" in printed
        assert "all nodes must see the same run folder" in printed
        assert "Traceback" not in printed
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["logs"]


@pytest.mark.parametrize("what", ["another recipe", "code"])
def test_a_node_with_another_recipe_or_other_code_starts_no_training(
    lab: Lab, tmp_path: Path, what: str
) -> None:
    run = tmp_path / "run"
    variables = srun(1)
    overrides = []
    if what == "code":
        for package in ("core", "plugins"):
            shutil.copytree(ROOT / package, tmp_path / "copy" / package)
        with (tmp_path / "copy" / "core" / "run" / "summary.py").open("a") as file:
            file.write("# one line more\n")
        variables["PYTHONPATH"] = f"{tmp_path / 'copy'}:{ROOT / 'tests'}"
    else:
        overrides = ["optimizer.lr=0.004"]
    with (
        started(fit(lab, run), tmp_path, srun(0)) as (first, _),
        started(fit(lab, run, *overrides), tmp_path, variables) as (second, _),
    ):
        _, err = first.communicate(timeout=SECONDS)
        second.communicate(timeout=SECONDS)
    assert (first.returncode, second.returncode) == (2, 2), err
    expected = "rank 1 on node 1 has read another recipe than rank 0: all nodes must have the same"
    if what == "code":
        expected = f"rank 1 on node 1 runs moeloom {core.__version__} (source "
    log = (run / "logs" / "rank-00001.log").read_text()
    for printed in (err, log):
        assert printed.count("moeloom: ") == 1
        assert f"moeloom: {expected}" in printed
    assert not list((run / "checkpoints").glob("*.ckpt"))


def test_a_node_ends_when_another_is_killed(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with both_nodes(lab, run, "srun", "budget.steps=5000") as (first, second):
        wait_for_rows(run, 2)
        second.kill()
        _, err = first.communicate(timeout=60)
    assert first.returncode == 1, err
    # A rank that is killed within its first seconds may not have said yet which process it is.
    who = rf"rank 1( \(process {second.pid} on {re.escape(socket.gethostname())}\))?"
    end = f"has ended before the run was done, so the run ends; its log: {run}/logs/rank-00001.log"
    assert re.search(rf"^moeloom: {who} {re.escape(end)}$", err, re.MULTILINE), err
    assert err.count("moeloom: ") == 1
    assert "Traceback" not in err


def wait_for_rows(run: Path, count: int) -> None:
    """Waits until a run has logged some steps."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        if (run / "metrics.csv").exists() and len(rows(run)) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("no step")
