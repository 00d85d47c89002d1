"""Profiled runs of two ranks: whole files, times that add up, and the bits of a run that is not profiled."""

import gzip
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, Lab, assert_same_run

from plugins.profiler.analysis import Event, read_events, split

EXPERTS = "strategy={name: expert_parallel, expert_ranks: 2, accelerator: cpu}"
DDP = "strategy={name: ddp, ranks: 2, accelerator: cpu}"
SHORT = ("budget.steps=5", "validation.every_steps=3")


def fit(lab: Lab, run: Path, *overrides: str) -> str:
    """Trains in two processes; returns what the run printed on stderr."""
    command = [
        sys.executable,
        "-m",
        "core.fit",
        str(lab.file),
        *SHORT,
        *overrides,
        "--out",
        str(run),
    ]
    python_path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(reversed([part for part in python_path if part]))
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, env=environment, cwd=run.parent, text=True, start_new_session=True, **pipes
    ) as process:
        try:
            _, err = process.communicate(timeout=240)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    return str(err)


def events_of(file: Path) -> list[Event]:
    """The events of a compressed trace."""
    return read_events(json.loads(gzip.decompress(file.read_bytes())))


def test_both_ranks_of_expert_parallel(lab: Lab, tmp_path: Path) -> None:
    fit(lab, tmp_path / "plain", EXPERTS)
    profiler = "callbacks=[{name: profiler, first_step: 3, steps: 2, ranks: all}]"
    err = fit(lab, tmp_path / "run", EXPERTS, profiler)
    assert_same_run(tmp_path / "run", tmp_path / "plain")
    folder = tmp_path / "run" / "profile"
    assert sorted(file.name for file in folder.iterdir()) == [
        "rank-00000.trace.json.gz",
        "rank-00001.trace.json.gz",
        "summary.json",
        "summary.md",
    ]
    assert err.count("note: profiler: steps 3 to 4 profiled") == 1
    assert (folder / "summary.md").read_text() in err
    ranks = json.loads((folder / "summary.json").read_text())["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:
        seconds, collectives = rank["seconds"], rank["collectives"]
        assert min(seconds.values()) > 0
        assert sum(seconds.values()) == pytest.approx(rank["wall_seconds"], rel=1e-12)
        uncovered = collectives["seconds"] - collectives["covered_seconds"]
        assert seconds["exchange"] + seconds["wait"] == pytest.approx(uncovered, rel=1e-9)
        names = [operator["name"] for operator in rank["operators"]]
        assert "c10d::alltoall_base_" in names
        found = split(events_of(folder / f"rank-{rank['rank']:05d}.trace.json.gz"), on_gpu=False)
        assert [step / 1e9 for step in found.steps] == rank["step_seconds"]


def test_the_first_rank_of_ddp(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(lab, run, DDP, "callbacks=[{name: profiler, first_step: 2, steps: 1}]")
    assert sorted(file.name for file in (run / "profile").iterdir()) == [
        "rank-00000.trace.json.gz",
        "summary.json",
        "summary.md",
    ]
    (rank,) = json.loads((run / "profile" / "summary.json").read_text())["ranks"]
    # How much of the exchange is covered by computing is up to the machine; one of the two is there.
    seconds, collectives = rank["seconds"], rank["collectives"]
    assert collectives["seconds"] > 0
    uncovered = collectives["seconds"] - collectives["covered_seconds"]
    assert seconds["exchange"] + seconds["wait"] == pytest.approx(uncovered, rel=1e-9)
    events = events_of(run / "profile" / "rank-00000.trace.json.gz")
    assert any(event.name == "gloo:all_reduce" for event in events)
