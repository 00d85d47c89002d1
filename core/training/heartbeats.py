"""Signs of life of a run's ranks, in the key-value store at which they meet.

A process that has ended can be seen on its own machine alone, and one that hangs nowhere. So every rank writes a line
about itself once a second. The first rank reads those of all others, the others read that of the first one. Each rank
also looks after the process of the next one on its node, and the last of a node after that of the first.

The store may be in a rank that hangs, and then never answers. Only the thread that beats waits for it.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.training.launchers import Launch

BEAT_SECONDS = 1.0
"""Seconds between two signs of life of a rank."""

STORE_SECONDS = 10.0
"""Seconds within which the store has to be there when a rank connects with it."""

END_SECONDS = 2.0
"""Seconds that a rank waits for its last sign to be written."""

BROKEN_SECONDS = 4.0
"""Seconds of silence after which a rank is lost where a connection has broken, so that some rank has ended."""

RUNS = "runs"
"""The state of a rank that trains."""

DONE = "done"
"""The state of a rank that has ended without an error."""

FAILED = "failed"
"""The state of a rank that ends with an error of its own."""

FOLLOWS = "follows"
"""The state of a rank that ends because another one is lost."""

GONE = "gone"
"""The state of a rank whose process has vanished, as another rank of its node writes."""


@dataclass
class Sign:
    """What is known of another rank.

    Args:
        count: how many signs it has given; 0: it has not come yet.
        state: whether it runs, or how it ends.
        process: its process id.
        namespace: the namespace of process ids in which it has that one.
        host: the name of its machine.
        silent: seconds without a new sign.
    """

    count: int = 0
    state: str = RUNS
    process: str = ""
    namespace: str = ""
    host: str = ""
    silent: float = 0.0


class Heartbeats:
    """Writes the signs of this rank and reads those of the ranks that it watches, in a thread of its own.

    Args:
        launch: this rank.
        address: the host at which the ranks meet.
        port: the port there.
    """

    def __init__(self, launch: Launch, address: str, port: int) -> None:
        self.rank = launch.rank
        self.first_has_store = launch.launcher != "torchrun"
        self.address = address
        self.port = port
        each = launch.ranks_per_node
        self.neighbour = launch.node * each + (launch.local_rank + 1) % each
        watched = set(range(launch.world)) if launch.rank == 0 else {0, self.neighbour}
        self.signs = {rank: Sign() for rank in sorted(watched - {launch.rank})}
        self.is_reachable = True
        self._attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._count = 0
        self._seen: set[int] = set()
        self._store: Any = None
        self._last = time.monotonic() - BEAT_SECONDS
        self._answered = time.monotonic()
        self._last_state: str | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True, name="heartbeats")

    def start(self) -> None:
        """Starts to beat."""
        self._thread.start()

    def look(self) -> None:
        """Brings the silence of the first rank up to date, if its store does not answer; waits for nothing."""
        if not self._thread.is_alive():
            return
        waited = time.monotonic() - self._answered
        if self._store is not None and self.rank and self.first_has_store:
            self.signs[0].silent = max(self.signs[0].silent, waited - BEAT_SECONDS)

    def _beat_on(self) -> None:
        """Beats until this rank ends, and then writes how it does."""
        while self._last_state is None:
            self.beat()
            self._wake.wait(BEAT_SECONDS / 4)
        if self._store is not None:
            with suppress(RuntimeError):
                self._write(self._store, self._last_state)

    def beat(self) -> None:
        """Writes a sign of this rank and reads the others', if the last time is a second ago.

        The store is that of the process group, which exists as soon as the first rank waits there for the others.
        """
        now = time.monotonic()
        passed = now - self._last
        if passed < BEAT_SECONDS:
            return
        self._last = now
        if self._store is None:
            self._store = _store_at(self.address, self.port)
        if self._store is None:
            return
        try:
            self._write(self._store, RUNS)
            self._read(self._store, passed)
            self._answered = time.monotonic()
            self.is_reachable = True
        except RuntimeError:
            self._answered = time.monotonic()
            self.is_reachable = False
            if self.rank and self.first_has_store:
                self.signs[0].silent += passed

    def end(self, state: str) -> None:
        """Writes how this rank ends, so that nobody waits for its next sign; gives up if the store does not answer."""
        self._last_state = state
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)
        elif self._store is not None:
            with suppress(RuntimeError):
                self._write(self._store, state)

    def silent(self, seconds: float) -> int | None:
        """The rank that has been silent for longest, at least for some seconds; None if there is none.

        One that has given no sign at all gets twice the time, because connecting with the store can take seconds. The
        first rank, which has the store, gets less where the connection with it has broken.
        """
        found = None
        longest = 0.0
        for rank, sign in self.signs.items():
            allowed = seconds if sign.count else 2 * seconds
            if rank == 0 and self.first_has_store and not self.is_reachable:
                allowed = min(allowed, BROKEN_SECONDS)
            if sign.state == RUNS and sign.silent >= allowed and sign.silent > longest:
                found = rank
                longest = sign.silent
        return found

    def failed(self) -> int | None:
        """The first rank that has ended with an error of its own; None if there is none."""
        return next((rank for rank, sign in self.signs.items() if sign.state == FAILED), None)

    def gone(self) -> int | None:
        """The first rank whose process has vanished; None if there is none."""
        return next((rank for rank, sign in self.signs.items() if sign.state == GONE), None)

    def missing(self) -> list[int]:
        """The ranks that have given no sign yet."""
        return [rank for rank, sign in self.signs.items() if not sign.count]

    def _write(self, store: Any, state: str) -> None:
        self._count += 1
        store.set(self._key(self.rank), f"{self._count} {state} {os.getpid()} {_place()}")

    def _read(self, store: Any, passed: float) -> None:
        """Reads the signs of the ranks that have come.

        Args:
            store: where they are.
            passed: seconds since the last time; where this process itself was stopped for a while, a beat is counted.
        """
        known = []
        for rank, sign in self.signs.items():
            if sign.count or store.check([self._key(rank)]):
                known.append(rank)
            elif dist.is_initialized():
                sign.silent += passed
        if not known:
            return
        lines = store.multi_get([self._key(rank) for rank in known])
        for rank, line in zip(known, lines, strict=True):
            sign = self.signs[rank]
            before = sign.count
            _take(sign, line)
            if sign.count != before:
                sign.silent = 0.0
            elif passed < 5 * BEAT_SECONDS:
                sign.silent += passed
            if rank == self.neighbour and sign.state == RUNS:
                self._look_after(store, rank, sign)

    def _look_after(self, store: Any, rank: int, sign: Sign) -> None:
        """Writes for a rank of this node that its process has vanished, if it could be seen before."""
        if f"{sign.namespace} {sign.host}" != _place():
            return  # its process id means nothing here
        if is_running(sign.process):
            self._seen.add(rank)
        elif rank in self._seen:
            _take(
                sign, store.get(self._key(rank))
            )  # what it has written last: it cannot write any more
            if sign.state == RUNS:
                sign.state = GONE
                store.set(self._key(rank), f"{sign.count + 1} {GONE} {sign.process} {_place()}")

    def _key(self, rank: int) -> str:
        """The key of a rank; torchrun's store stays the same where it starts the ranks again."""
        return f"moeloom/{self._attempt}/{rank}"


def _take(sign: Sign, line: bytes) -> None:
    """Notes what a rank has written about itself."""
    count, sign.state, sign.process, sign.namespace, sign.host = line.decode().split(" ", 4)
    sign.count = int(count)


def _place() -> str:
    """The namespace of this process's id, and the name of this machine."""
    namespace = "-"
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{namespace} {socket.gethostname()}"


def is_running(process: str) -> bool:
    """Whether there is a process with this id that has not ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _store_at(address: str, port: int) -> Any:
    """Connects with the store; None if nobody listens there yet, which torch itself would print a warning about."""
    try:
        socket.create_connection((address, port), timeout=BEAT_SECONDS).close()
        return dist.TCPStore(  # type: ignore[attr-defined]
            address, port, timeout=timedelta(seconds=STORE_SECONDS), wait_for_workers=False
        )
    except (OSError, RuntimeError):
        return None
