"""Running a sweep: every run a process of `core.fit` in a folder of its own, a few at a time.

A run that fails is written down with its reason and stops nobody else. Whatever ends the runner, the runs' own
checkpoints stay, and the next runner goes on from them.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from core.study.folder import Job, Status, SweepFolder
from core.study.results import value_of

GRACE = 60.0
"""Seconds that a run gets to save itself before it is killed."""
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class Pool(Protocol):
    """Where runs are worked on."""

    slots: int

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Begin a run; the future gives its exit code and its seconds."""

    def stop(self) -> None:
        """End the runs under way: each saves itself."""


class LocalPool:
    """Processes on this machine, which share its cores: each gets its part, or OMP_NUM_THREADS where that is set.

    Args:
        slots: runs at a time.
        started: told the process of each run.
    """

    def __init__(self, slots: int, started: Callable[[Job, int], None]) -> None:
        self.slots, self.started = slots, started
        told = os.environ.get("OMP_NUM_THREADS", "")
        self.threads = int(told) if told.isdecimal() and int(told) else max(1, len(os.sched_getaffinity(0)) // slots)
        self._workers = ThreadPoolExecutor(slots)
        self._under_way: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopping = threading.Lock(), False

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Begin as soon as a worker is free."""
        return self._workers.submit(self._run, job, command)

    def _run(self, job: Job, command: list[str]) -> tuple[int, float]:
        began = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with job.log.open("ab") as log:
            with self._lock:
                if self._stopping:
                    return -signal.SIGTERM, 0.0
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=_die_with_parent,
                )
                self._under_way.add(process)
            self.started(job, process.pid)
            code = process.wait()
        with self._lock:
            self._under_way.discard(process)
        return code, time.monotonic() - began

    def stop(self) -> None:
        """SIGTERM saves a run after the step under way; what does not end is killed."""
        with self._lock:
            self._stopping = True
            under_way = list(self._under_way)
        for process in under_way:
            with suppress(ProcessLookupError):
                process.terminate()
        for process in under_way:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        self._workers.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    """On Linux a runner that is killed takes its runs along: each gets SIGTERM and saves itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


def command_of(job: Job, folder: SweepFolder) -> list[str]:
    """The command of a run: it begins, or goes on with what is in its folder."""
    recipe = folder.recipe(job.variant)
    quiet = ["trainer.enable_progress_bar=false", f"seed={job.seed}"]
    begun = (job.path / "recipe.yaml").exists()
    where = ["--resume", str(job.path)] if begun else ["--out", str(job.path)]
    return [sys.executable, "-m", "core.fit", str(recipe), *quiet, *where]


def run_jobs(
    jobs: list[Job], folder: SweepFolder, pool: Pool, metric: str, ended: Callable[[Job, Status], None]
) -> None:
    """Work on every run that is not done, and write down how each ended.

    Args:
        jobs: in order.
        folder: the sweep's.
        pool: where they run.
        metric: that a finished run must have.
        ended: told after each run.
    """
    waiting = iter(jobs)
    under_way: dict[Future[tuple[int, float]], Job] = {}
    try:
        while True:
            for job in _next(waiting, pool.slots - len(under_way)):
                _leave_alone(folder.status(job))
                job.path.mkdir(parents=True, exist_ok=True)
                folder.tell(job, replace(folder.status(job), state="running", reason=None))
                under_way[pool.submit(job, command_of(job, folder))] = job
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                job = under_way.pop(future)
                code, seconds = future.result()
                before = folder.status(job)
                status = _ended(job, code, before.seconds + seconds, metric)
                folder.tell(job, status)
                ended(job, status)
    finally:
        pool.stop()
        for job in under_way.values():
            if (status := folder.status(job)).state == "running":
                folder.tell(job, replace(status, state="waiting", process=None))


def _next(waiting: Iterator[Job], count: int) -> Iterator[Job]:
    for _ in range(count):
        job = next(waiting, None)
        if job is None:
            return
        yield job


def _ended(job: Job, code: int, seconds: float, metric: str) -> Status:
    """How a run ended, with the reason where it is not a result."""
    if code == 0 and (job.path / "summary.json").exists():
        if value_of(job, metric) is None:
            return Status("failed", f"its summary has no finite {metric}", seconds)
        return Status("done", None, seconds)
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM, 130):
        return Status("waiting", None, seconds)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Status("failed", f"{how}: {_last_words(job.log)}", seconds)


def _last_words(log: Path) -> str:
    """The sentence by which a run explained itself, or the last line of its log."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    told = [line.removeprefix("moeloom: ") for line in lines if line.startswith("moeloom: ")]
    return told[-1] if told else (lines[-1].strip() if lines else "it printed nothing")


def _leave_alone(status: Status) -> None:
    """Wait for a process that an earlier runner left behind in the run's folder, then end it."""
    if status.state != "running" or status.process is None or not _is_fit(status.process):
        return
    for how, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.kill(status.process, how)
        until = time.monotonic() + patience
        while time.monotonic() < until and _is_fit(status.process):
            time.sleep(0.1)


def _is_fit(process: int) -> bool:
    """Whether a process is a run of ours: numbers are used again."""
    try:
        return b"core.fit" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
