"""Watches the ranks of a run: where one is lost, the others end, and one sentence names it and its log."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.command import STOPPING, show_cursor
from core.contracts.errors import RunFailed
from core.training.heartbeats import BROKEN_SECONDS, FOLLOWS, RUNS, Heartbeats
from core.training.launchers import Launch
from core.training.rank_logs import log_hint, write_to_first_stderr

POLL_SECONDS = 0.5
"""Seconds between looks at the other processes."""

GRACE_SECONDS = 2.0
"""Seconds that a rank gets to notice by itself that another one is lost."""

RENDEZVOUS_TIMEOUT = 300.0
"""Seconds within which all ranks have to meet at the start."""

SILENCE_SECONDS = 300.0
"""Seconds without a sign of life after which a rank is lost; fewer where a collective waits for less."""

SEARCH_SECONDS = 10.0
"""Seconds in which a rank looks for the one that has ended."""

CONNECTION_LOSS = (
    "Connection closed by peer",
    "Connection refused",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
)
"""How gloo and NCCL report that the process of another rank has ended, possibly on another machine."""

TIMED_OUT = (
    "Timed out waiting",
    "Wait timeout",
    "wait timeout",
    "Watchdog caught collective operation timeout",
)
"""How gloo, the store and NCCL report that another rank has not come to a collective."""


class RankLost(RunFailed):
    """Another rank ended before the run was done; each rank that is left says so."""


def is_connection_loss(error: BaseException) -> bool:
    """Whether a collective failed because the process of another rank has ended."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    return _has_sign(error, CONNECTION_LOSS)


def is_timeout(error: BaseException) -> bool:
    """Whether a collective failed because another rank has not come to it in time."""
    return _has_sign(error, TIMED_OUT)


def _has_sign(error: BaseException, signs: tuple[str, ...]) -> bool:
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


class RankWatch:
    """Watches the other ranks in a thread, and ends this process if one of them is lost.

    The process ends at once, because its main thread may wait for the lost rank inside a library.

    Args:
        launch: this rank.
        children: the ranks that this process has started on its machine, from rank 1 on; none of a launcher's tasks.
        beats: the signs of life of the ranks.
        folder: the run folder, with the logs of the ranks.
        timeout: how long a collective waits for a rank; None: as long as torch decides.
    """

    def __init__(
        self,
        launch: Launch,
        children: list["subprocess.Popen[Any]"],
        beats: Heartbeats,
        folder: Path,
        timeout: timedelta | None = None,
    ) -> None:
        self.own = launch
        self.children = children
        self.beats = beats
        self.folder = folder
        self.timeout = timeout
        self.silence = SILENCE_SECONDS
        if timeout is not None:
            self.silence = min(self.silence, timeout.total_seconds())
        self.deadline = time.monotonic() + RENDEZVOUS_TIMEOUT
        self._stopped = threading.Event()
        self._signals = _SignalPipe()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rank-watch")

    def start(self) -> None:
        """Starts watching."""
        self._signals.open()
        self.beats.start()
        self._thread.start()

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._signals.close()

    def lost(self, *, disconnected: bool = False) -> str | None:
        """The sentence about a rank that has ended or has not come; None if all is well.

        Args:
            disconnected: whether a connection between two ranks has broken, so that one of all has ended.
        """
        self.beats.look()
        parent = self.own.parent
        if parent is not None and os.getppid() != parent:
            return (
                f"rank 0 (process {parent}) ended before the run was done, "
                f"so rank {self.own.rank} ends too"
            )
        return (
            self._ended_child()
            or self._ended_task()
            or self._silent_rank(disconnected=disconnected)
            or self._missing_rank()
        )

    def _ended_child(self) -> str | None:
        """The sentence about a rank started here that has ended; one that a signal ended comes first.

        One that ends without an error may have come to the end of the run, unless the ranks have not even met.
        """
        have_met = dist.is_initialized()
        codes: dict[int, int] = {}
        for rank, child in enumerate(self.children, start=1):
            code = child.poll()
            if code or (code == 0 and not have_met):
                codes[rank] = code
        if not codes:
            return None
        rank = min(codes, key=lambda rank: (codes[rank] > 0, rank))
        who = f"rank {rank} (process {self.children[rank - 1].pid})"
        return f"{who} {_ended(codes[rank])} {self._so_the_run_ends(rank)}"

    def _ended_task(self) -> str | None:
        """The sentence about a rank that has vanished, or a launcher's task that ends with an error of its own."""
        gone = self.beats.gone()
        if gone is not None:
            return f"{self._name(gone)} has ended {self._so_the_run_ends(gone)}"
        if self.own.launcher is None:
            return None
        failed = self.beats.failed()
        if failed is not None:
            return f"{self._name(failed)} has failed {self._so_the_run_ends(failed)}"
        return None

    def _silent_rank(self, *, disconnected: bool) -> str | None:
        """The sentence about a rank that has given no sign of life for some seconds."""
        rank = self.beats.silent(BROKEN_SECONDS if disconnected else self.silence)
        if rank is None:
            return None
        how = f"has given no sign of life for {self.beats.signs[rank].silent:.0f} s"
        if disconnected:
            how = "has ended"
        return f"{self._name(rank)} {how} {self._so_the_run_ends(rank)}"

    def _missing_rank(self) -> str | None:
        """The sentence about ranks that do not meet in time."""
        if dist.is_initialized() or time.monotonic() < self.deadline:
            return None
        world = self.own.world
        waited = f"has waited {RENDEZVOUS_TIMEOUT:.0f} s for the {world} ranks to meet, and ends"
        return f"rank {self.own.rank} {waited}{self._missing_hint()}"

    def _missing_hint(self) -> str:
        """The end of a sentence about ranks that do not meet: those that have not come, and the log of the first."""
        missing = self.beats.missing()
        if not missing:
            return ""
        others = " has"
        if len(missing) > 1:
            others = f" and {len(missing) - 1:,} others have"
        return f": rank {missing[0]}{others} not come{log_hint(self.folder, missing[0])}"

    def _name(self, rank: int) -> str:
        """A rank with its process and, where the ranks are spread over machines, its machine."""
        sign = self.beats.signs[rank]
        if not sign.count:
            return f"rank {rank}"
        place = f" on {sign.host}" if self.own.nodes > 1 else ""
        return f"rank {rank} (process {sign.process}{place})"

    def _so_the_run_ends(self, rank: int) -> str:
        """The end of the sentence about a lost rank, with the log of any but the first."""
        if rank == 0:
            return f"before the run was done, so rank {self.own.rank} ends too"
        return f"before the run was done, so the run ends{log_hint(self.folder, rank)}"

    def reason_of(self, error: Exception) -> str | None:
        """The sentence about the rank because of which this one has failed; None if the error is its own.

        Stops watching. The other rank may take a moment to end, or until its silence is noticed.

        Args:
            error: what the run has raised.
        """
        self.stop()
        late = is_timeout(error)
        disconnected = is_connection_loss(error) and not late
        until = time.monotonic() + (SEARCH_SECONDS if disconnected or late else GRACE_SECONDS)
        while time.monotonic() < until:
            lost = self.lost(disconnected=disconnected)
            if lost is not None:
                self._tell_first(lost)
                return lost
            time.sleep(0.05)
        if late:
            return f"rank {self.own.rank} has waited {self._waited()} for another rank, so the run ends"
        if disconnected:
            return f"rank {self.own.rank} has lost its connection to another rank, so the run ends"
        return None

    def _waited(self) -> str:
        """How long a collective has waited."""
        if self.timeout is None:
            return "too long"
        minutes = self.timeout.total_seconds() / 60
        return f"{minutes:g} minutes (strategy.timeout_minutes)"

    def end_children(self) -> None:
        """Ends the ranks that this one has started."""
        self._stopped.set()
        for child in self.children:
            with suppress(ProcessLookupError):
                child.kill()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            signum = self._signals.read()
            waited = signum and not self._stopped.wait(GRACE_SECONDS)
            if waited and not dist.is_initialized():
                self._end(self._signal_sentence(signum), 128 + signum)
            lost = self.lost()
            grace = 0.0 if self.beats.gone() is not None else GRACE_SECONDS
            if lost is not None and not self._stopped.wait(grace):
                self._end(lost, 1)
            self._stopped.wait(POLL_SECONDS)

    def _signal_sentence(self, signum: int) -> str:
        """The sentence about a signal that has come while the main thread waits in torch for the other ranks."""
        name = signal.Signals(signum).name
        waited = (
            f"has received {name} while it waited for the {self.own.world} ranks to meet, and ends"
        )
        return f"rank {self.own.rank} {waited}{self._missing_hint()}"

    def _end(self, lost: str, code: int) -> None:
        """Ends this process and those that it has started."""
        self.end_children()
        self.beats.end(FOLLOWS)
        show_cursor()
        os.write(2, f"moeloom: {lost}\n".encode())
        self._tell_first(lost)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    def _tell_first(self, lost: str) -> None:
        """Prints the sentence about a lost first rank where that would have printed, unless it has ended by itself."""
        first = self.beats.signs.get(0)
        if first is not None and first.state == RUNS and lost.startswith("rank 0 "):
            write_to_first_stderr(self.own, lost)


def _ended(code: int) -> str:
    """How a process ended, from its exit code."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


class _SignalPipe:
    """The numbers of signals as they arrive, for a thread other than the main one.

    Python's own handlers run in the main thread, and not before that has returned from a library.
    """

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None
        self._before = -1

    def open(self) -> None:
        """Begins to note signals; does nothing outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)

    def read(self) -> int:
        """The signal that came last since the last call, of those that end a run; 0 without one."""
        if self._ends is None:
            return 0
        with suppress(OSError):
            received = os.read(self._ends[0], 64)
            ending = [signum for signum in received if signum in (signal.SIGINT, *STOPPING)]
            return ending[-1] if ending else 0
        return 0

    def close(self) -> None:
        """Ends noting signals."""
        if self._ends is None or threading.current_thread() is not threading.main_thread():
            return
        signal.set_wakeup_fd(self._before)
        ends, self._ends = self._ends, None
        for end in ends:
            os.close(end)
