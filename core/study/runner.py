"""Runs the jobs of a sweep: each is a process of `core.fit` in a folder of its own, a few at a time.

A run that fails is recorded with its reason and stops no other. Whatever ends the runner, the runs' own checkpoints
stay, and the next runner goes on from them.
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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Protocol

from core.contracts.errors import UserError
from core.storage.documents import DocumentError, read_object
from core.study.child import NO_SPACE, ORPHANED
from core.study.cores import cores
from core.study.results import never_measured, value_of
from core.study.sweep_folder import Job, Status, SweepFolder

GRACE = 60.0
"""Seconds that a run gets to save itself before it is killed."""

_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class Pool(Protocol):
    """A place that works on runs, so many at a time."""

    slots: int

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Begins a run; the future gives its exit code and its seconds."""

    def stop(self) -> None:
        """Ends the runs under way: each saves itself."""


class LocalPool:
    """Processes on this machine, which share its cores: each gets its part, or OMP_NUM_THREADS if that is less.

    A run that was begun keeps its number of threads, since its results would differ in their bits with another.

    Args:
        slots: runs at a time.
        started: called with each run and its process id.
        gpus: the GPU of each slot; empty: a run sees what this process sees.
    """

    def __init__(
        self, slots: int, started: Callable[[Job, int], None], gpus: Sequence[str] = ()
    ) -> None:
        self.slots = slots
        self.started = started
        self._free_gpus = list(gpus)
        self.threads = max(1, cores() // slots)
        limit = os.environ.get("OMP_NUM_THREADS", "")
        if limit.isdecimal() and int(limit):
            self.threads = min(int(limit), self.threads)
        self._workers = ThreadPoolExecutor(slots)
        self._under_way: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Begins the run as soon as a worker is free."""
        return self._workers.submit(self._run, job, command)

    def _run(self, job: Job, command: list[str]) -> tuple[int, float]:
        """Runs the command and waits for it; returns its exit code and its seconds."""
        began = time.monotonic()
        threads = threads_begun_with(job) or max(1, self.threads // job.ranks)
        with job.log.open("ab") as log:
            with self._lock:
                if self._stopping:
                    return -signal.SIGTERM, 0.0
                gpu = self._free_gpus.pop(0) if self._free_gpus else None
                process = start(command, log, threads, gpu)
                self._under_way.add(process)
            self.started(job, process.pid)
            code = process.wait()
        with self._lock:
            self._under_way.discard(process)
            if gpu is not None:
                self._free_gpus.append(gpu)
        return code, time.monotonic() - began

    def stop(self) -> None:
        """Sends SIGTERM, at which a run saves itself after the step under way, and kills what does not end."""
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


def start(
    command: list[str], log: IO[bytes], threads: int, gpu: str | None = None
) -> "subprocess.Popen[bytes]":
    """Starts a run's process in a session of its own: Ctrl-C reaches the runner alone, which sends each run a SIGTERM.

    On Linux the runs end with a runner that is killed: each receives `ORPHANED` and saves itself.

    Args:
        command: the run's.
        log: the file of its output.
        threads: the number of threads of each of its ranks.
        gpu: the only GPU that it sees; None: those that this process sees.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        if _LIBRARY is not None:
            _LIBRARY.prctl(_DEATH_SIGNAL, ORPHANED)
            if os.getppid() != parent:  # the runner died before this call
                os._exit(1)

    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["RAYON_NUM_THREADS"] = str(threads)
    environment["PYTHONUNBUFFERED"] = "1"
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def threads_begun_with(job: Job) -> int | None:
    """The number of threads that a run began with, from its provenance; None if it has not begun."""
    try:
        provenance = read_object(job.path / "provenance.json")
    except DocumentError:
        return None
    threads = provenance.get("threads")
    if isinstance(threads, int) and threads > 0:
        return threads
    return None


def command_of(job: Job, folder: SweepFolder, trust: bool = False) -> list[str]:
    """The command of a run: it begins, or goes on with what is in its folder.

    The modules that its recipe names are named here too, so that another machine of a cluster imports them.
    """
    recipe = folder.recipe(job.variant)
    overrides = ["trainer.enable_progress_bar=false", f"seed={job.seed}"]
    plugins = job.variant.recipe.plugins
    if plugins:
        overrides.append(f"plugins={json.dumps(plugins)}")
    if trust:
        overrides.append("--trust")
    begun = (job.path / "recipe.yaml").exists()
    option = "--resume" if begun else "--out"
    command = [sys.executable, "-m", "core.study.child", str(recipe)]
    return [*command, *overrides, option, str(job.path)]


def run_jobs(
    jobs: list[Job],
    folder: SweepFolder,
    pool: Pool,
    metric: str,
    *,
    trust: bool = False,
    began: Callable[[Job], None],
    ended: Callable[[Job, Status], None],
) -> None:
    """Works on every run that is not done, and records how each ended.

    Args:
        jobs: the runs, in order.
        folder: the sweep's.
        pool: where they run.
        metric: a finished run must have it.
        trust: whether recipes that were made elsewhere may name modules.
        began: called before each run.
        ended: called after each run, with its final status.

    Raises:
        UserError: a finished run shows that none can have the metric.
        OSError: no space is left on the disk, for the runner or for a run; that run is set back to "waiting".
    """
    waiting = iter(jobs)
    under_way: dict[Future[tuple[int, float]], Job] = {}
    logged: dict[Path, int] = {}
    try:
        while True:
            for job in islice(waiting, pool.slots - len(under_way)):
                _end_leftover(job, folder.status(job))
                began(job)
                job.path.mkdir(parents=True, exist_ok=True)
                before = folder.status(job)
                running = replace(before, state="running", reason=None, process=None)
                folder.write_status(job, running)
                logged[job.path] = job.log.stat().st_size if job.log.exists() else 0
                under_way[pool.submit(job, command_of(job, folder, trust))] = job
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                job = under_way.pop(future)
                code, seconds = future.result()
                before = folder.status(job)
                seconds += before.seconds
                if code == NO_SPACE:  # every other run would meet it too
                    again = replace(before, state="waiting", seconds=seconds, process=None)
                    folder.write_status(job, again)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                status = _final_status(job, code, seconds, metric, logged[job.path])
                folder.write_status(job, status)
                ended(job, status)
                if code == 0 and (why := never_measured(job, metric)):
                    raise UserError(f"metric = {metric!r}: {job.name} has ended without it: {why}")
    finally:
        pool.stop()
        for job in under_way.values():
            status = folder.status(job)
            if status.state == "running":
                folder.write_status(job, replace(status, state="waiting", process=None))


def _final_status(job: Job, code: int, seconds: float, metric: str, logged: int) -> Status:
    """The status of a run that has ended: done, or failed with the reason.

    A run that another process stopped with a signal has failed; for runs that the runner stops this is not called.

    Args:
        job: the run.
        code: its exit code.
        seconds: how long it ran, all attempts together.
        metric: a finished run must have it.
        logged: the size of its log before this attempt.
    """
    if code == 0 and (job.path / "summary.json").exists():
        if value_of(job, metric) is None:
            return Status("failed", f"its summary has no finite {metric}", seconds)
        return Status("done", None, seconds)
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    else:
        how = f"exit code {code}"
    return Status("failed", f"{how}: {_last_message(job.log, logged)}", seconds)


def _last_message(log: Path, since: int) -> str:
    """The last error message in the log of this attempt, or else its last line.

    Args:
        log: the run's log file.
        since: the size of the log before this attempt.
    """
    try:
        text = log.read_bytes()[since:].decode("utf-8", "replace")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("moeloom: "):
            return line.removeprefix("moeloom: ")
    if lines:
        return lines[-1].strip()
    return "it printed nothing"


def _end_leftover(job: Job, status: Status) -> None:
    """Ends a process that an earlier runner left behind in the run's folder; it gets time to save itself."""
    if status.state != "running" or status.process is None or not _works_on(job, status.process):
        return
    for how, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.kill(status.process, how)
        until = time.monotonic() + patience
        while time.monotonic() < until and _works_on(job, status.process):
            time.sleep(0.1)


def _works_on(job: Job, process: int) -> bool:
    """Whether a process works on this run: process ids are used again for other programs."""
    try:
        return os.fsencode(job.path) in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
