"""Running a sweep: every run a process of `core.fit` in a folder of its own, a few at a time.

A run that fails is written down with its reason and stops nobody else. Whatever ends the runner, the runs' own
checkpoints stay, and the next runner goes on from them.
"""

import ctypes
import errno
import json
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
from typing import IO, Protocol

from core.contracts.errors import UserError
from core.study.child import NO_SPACE, ORPHANED
from core.study.cores import cores
from core.study.folder import Job, Status, SweepFolder
from core.study.results import never_measured, value_of

GRACE = 60.0
"""Seconds that a run gets to save itself before it is killed."""
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class Pool(Protocol):
    """Where runs are worked on."""

    slots: int

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Begin a run; the future gives its exit code and its seconds."""

    def stop(self) -> None:
        """End the runs under way: each saves itself."""


class LocalPool:
    """Processes on this machine, which share its cores: each gets its part, or OMP_NUM_THREADS where that is less.

    A run that was begun keeps the threads that it began with: under others its bits would differ.

    Args:
        slots: runs at a time.
        started: told the process of each run.
    """

    def __init__(self, slots: int, started: Callable[[Job, int], None]) -> None:
        self.slots, self.started = slots, started
        told = os.environ.get("OMP_NUM_THREADS", "")
        share = max(1, cores() // slots)
        self.threads = min(int(told), share) if told.isdecimal() and int(told) else share
        self._workers = ThreadPoolExecutor(slots)
        self._under_way: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopping = threading.Lock(), False

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Begin as soon as a worker is free."""
        return self._workers.submit(self._run, job, command)

    def _run(self, job: Job, command: list[str]) -> tuple[int, float]:
        began = time.monotonic()
        threads = threads_begun_with(job) or max(1, self.threads // job.ranks)
        with job.log.open("ab") as log:
            with self._lock:
                if self._stopping:
                    return -signal.SIGTERM, 0.0
                process = start(command, log, threads)
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


def start(command: list[str], log: IO[bytes], threads: int) -> "subprocess.Popen[bytes]":
    """A run's process, in a session of its own: Ctrl-C reaches the runner alone, which then tells each run once.

    On Linux a runner that is killed takes its runs along: each is told and saves itself.

    Args:
        command: of the run.
        log: what it prints goes here.
        threads: of each of its ranks.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        if _LIBRARY is not None:
            _LIBRARY.prctl(_DEATH_SIGNAL, ORPHANED)
            if os.getppid() != parent:  # it died before we asked
                os._exit(1)

    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def threads_begun_with(job: Job) -> int | None:
    """The threads of a run that is begun, as its provenance tells them."""
    try:
        threads = json.loads((job.path / "provenance.json").read_text(encoding="utf-8")).get("threads")
    except (OSError, ValueError):
        return None
    return threads if isinstance(threads, int) and threads > 0 else None


def command_of(job: Job, folder: SweepFolder) -> list[str]:
    """The command of a run: it begins, or goes on with what is in its folder."""
    recipe = folder.recipe(job.variant)
    quiet = ["trainer.enable_progress_bar=false", f"seed={job.seed}"]
    begun = (job.path / "recipe.yaml").exists()
    where = ["--resume", str(job.path)] if begun else ["--out", str(job.path)]
    return [sys.executable, "-m", "core.study.child", str(recipe), *quiet, *where]


def run_jobs(
    jobs: list[Job],
    folder: SweepFolder,
    pool: Pool,
    metric: str,
    *,
    began: Callable[[Job], None],
    ended: Callable[[Job, Status], None],
) -> None:
    """Work on every run that is not done, and write down how each ended.

    Args:
        jobs: in order.
        folder: the sweep's.
        pool: where they run.
        metric: that a finished run must have.
        began: told before each run.
        ended: told after each run, with how it ended.

    Raises:
        UserError: a finished run shows that none can have the metric.
        OSError: no space is left on the disk, for the runner or for a run; that run waits.
    """
    waiting = iter(jobs)
    under_way: dict[Future[tuple[int, float]], Job] = {}
    logged: dict[Path, int] = {}
    try:
        while True:
            for job in _next(waiting, pool.slots - len(under_way)):
                _leave_alone(job, folder.status(job))
                began(job)
                job.path.mkdir(parents=True, exist_ok=True)
                folder.tell(job, replace(folder.status(job), state="running", reason=None, process=None))
                logged[job.path] = job.log.stat().st_size if job.log.exists() else 0
                under_way[pool.submit(job, command_of(job, folder))] = job
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                job = under_way.pop(future)
                code, seconds = future.result()
                before = folder.status(job)
                if code == NO_SPACE:  # every other run would meet it too
                    folder.tell(job, replace(before, state="waiting", seconds=before.seconds + seconds, process=None))
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                status = _ended(job, code, before.seconds + seconds, metric, logged[job.path])
                folder.tell(job, status)
                ended(job, status)
                if code == 0 and (why := never_measured(job, metric)):
                    raise UserError(f"metric = {metric!r}: {job.name} has ended without it: {why}")
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


def _ended(job: Job, code: int, seconds: float, metric: str, logged: int) -> Status:
    """How a run ended, with the reason where it is not a result.

    A run that somebody else stopped with a signal is one that failed; those that the runner stops do not come here.
    """
    if code == 0 and (job.path / "summary.json").exists():
        if value_of(job, metric) is None:
            return Status("failed", f"its summary has no finite {metric}", seconds)
        return Status("done", None, seconds)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Status("failed", f"{how}: {_last_words(job.log, logged)}", seconds)


def _last_words(log: Path, since: int) -> str:
    """The sentence by which a run explained itself, or the last line of its log; of this attempt alone."""
    try:
        text = log.read_bytes()[since:].decode("utf-8", "replace")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line.removeprefix("moeloom: ") for line in lines if line.startswith("moeloom: ")]
    return told[-1] if told else (lines[-1].strip() if lines else "it printed nothing")


def _leave_alone(job: Job, status: Status) -> None:
    """End a process that an earlier runner left behind in the run's folder; it gets time to save itself."""
    if status.state != "running" or status.process is None or not _is_of(job, status.process):
        return
    for how, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.kill(status.process, how)
        until = time.monotonic() + patience
        while time.monotonic() < until and _is_of(job, status.process):
            time.sleep(0.1)


def _is_of(job: Job, process: int) -> bool:
    """Whether a process works on this run: numbers are used again."""
    try:
        return os.fsencode(job.path) in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
