"""Runs as real processes: whatever they start is found by a mark in its environment, and has ended afterwards."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lab import ROOT

MARK = "MOELOOM_TEST_PROCESSES"
"""The environment variable by which the processes of a test are found; torchrun's workers leave its group."""


@contextmanager
def started(
    command: list[str], folder: Path, variables: Mapping[str, str] | None = None
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A Python process with pipes in a session of its own, and the mark of all that it starts.

    Args:
        command: the arguments of Python.
        folder: the current folder of the process.
        variables: of its environment, beside those of this process.
    """
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "GLOO_SOCKET_IFNAME": "lo",
        MARK: mark,
        **(variables or {}),
    }
    with subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=folder,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process, mark
        finally:
            for pid in pids_with(f"{MARK}={mark}"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def pids_with(*variables: str) -> list[int]:
    """The processes with some variables in their environment, each as `NAME=VALUE`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (process / "environ").read_bytes()
            if all(f"{variable}\0".encode() in environment for variable in variables):
                found.append(int(process.name))
    return found
