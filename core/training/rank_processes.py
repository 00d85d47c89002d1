"""The processes of a run's ranks: started by the first one, and ended together.

Lightning ends the first rank by SIGKILL if another one fails, without a word, and leaves the others waiting if the
first one is killed. Here every rank watches: where one is lost, the others end with one sentence.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from core.command import show_cursor
from core.contracts.errors import Interrupted, RunFailed, UserError
from core.training.launchers import FIRST_RANK, Launch

POLL_SECONDS = 0.5
"""Seconds between looks at the other processes."""

GRACE_SECONDS = 2.0
"""Seconds that a rank gets to notice by itself that another one is lost."""

RENDEZVOUS_TIMEOUT = 300.0
"""Seconds within which all ranks have to meet at the start."""


CONNECTION_LOSS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
)
"""How gloo and NCCL report that the process of another rank has ended, possibly on another machine."""


class RankLost(RunFailed):
    """Another rank ended before the run was done; each rank that is left says so."""


class RunEnvironment(LightningEnvironment):
    """The ranks as Lightning sees them; nothing else in the environment counts."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self.launch = launch
        self._port = launch.port
        self._global_rank = launch.rank
        self._world_size = launch.world

    @property
    def creates_processes_externally(self) -> bool:
        """Whether something else starts the ranks: a launcher or, for a rank that it started, the first one."""
        return self.launch.launcher is not None or self.launch.parent is not None

    @property
    def main_address(self) -> str:
        """The address at which the ranks meet: that of the first node."""
        address: str = self.launch.address
        if self.launch.launcher == "srun":
            address = SLURMEnvironment.resolve_root_node_address(address)
        return address

    @property
    def main_port(self) -> int:
        """The port at which the ranks meet; the first rank chooses a free one."""
        if self.launch.parent is not None:
            return int(os.environ["MASTER_PORT"])
        if not self._port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._port = free.getsockname()[1]
        return self._port

    def set_world_size(self, size: int) -> None:
        """Changes nothing: the recipe says how many ranks there are."""

    def set_global_rank(self, rank: int) -> None:
        """Changes nothing: this process has its rank from the start."""

    def local_rank(self) -> int:
        """The number of this rank among those of its node, which is that of its device."""
        return self.launch.local_rank

    def node_rank(self) -> int:
        """The number of this rank's node."""
        return self.launch.node

    def teardown(self) -> None:
        """Leaves the environment variables alone."""


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks, and watches over them while a function runs."""

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kw: Any
    ) -> Any:
        """Calls the function in every rank.

        Raises:
            RankLost: another rank ended before the function did.
        """
        environment = self.cluster_environment
        assert isinstance(environment, RunEnvironment)
        if not environment.creates_processes_externally:
            os.environ[FIRST_RANK] = str(os.getpid())
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        watch = RankWatch(environment.launch, self.procs)
        watch.start()
        try:
            return function(*args, **kw)
        except (Interrupted, KeyboardInterrupt, SystemExit):
            raise
        except (RunFailed, UserError):
            watch.end_children()
            raise
        except Exception as error:
            lost = watch.wait_until_lost()
            watch.end_children()
            if lost is None and is_connection_loss(error):
                lost = f"rank {environment.launch.rank} has lost its connection to another rank, so the run ends"
            if lost is None:
                raise
            raise RankLost(lost) from error
        finally:
            watch.stop()


def is_connection_loss(error: BaseException) -> bool:
    """Whether a collective failed because the process of another rank has ended."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in CONNECTION_LOSS)


class RankWatch:
    """Watches the other ranks in a thread, and ends this process if one of them is lost.

    The process ends at once, because its main thread may wait for the lost rank inside a library.

    Args:
        launch: this rank.
        children: the ranks that this process has started on its machine, from rank 1 on; none of a launcher's tasks.
    """

    def __init__(self, launch: Launch, children: list["subprocess.Popen[Any]"]) -> None:
        self.rank = launch.rank
        self.world = launch.world
        self.parent = launch.parent
        self.children = children
        self.deadline = time.monotonic() + RENDEZVOUS_TIMEOUT
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rank-watch")

    def start(self) -> None:
        """Starts watching."""
        self._thread.start()

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()

    def lost(self) -> str | None:
        """The sentence about a rank that has ended or has not come; None if all is well."""
        for rank, child in enumerate(self.children, start=1):
            code = child.poll()
            if code:
                ended = _ended(code)
                return f"rank {rank} (process {child.pid}) {ended} before the run was done, so the run ends"
        if self.parent is not None and os.getppid() != self.parent:
            return f"rank 0 (process {self.parent}) ended before the run was done, so rank {self.rank} ends too"
        if not dist.is_initialized() and time.monotonic() > self.deadline:
            waited = f"has waited {RENDEZVOUS_TIMEOUT:.0f} s for the {self.world} ranks to meet"
            return f"rank {self.rank} {waited}, and ends"
        return None

    def wait_until_lost(self) -> str | None:
        """Stops watching; returns the sentence about a lost rank, which may take a moment to end."""
        self.stop()
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until:
            lost = self.lost()
            if lost is not None:
                return lost
            time.sleep(0.05)
        return None

    def end_children(self) -> None:
        """Ends the ranks that this one has started."""
        self.stop()
        for child in self.children:
            with suppress(ProcessLookupError):
                child.kill()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            lost = self.lost()
            if lost is not None and not self._stopped.wait(GRACE_SECONDS):
                self._end(lost)

    def _end(self, lost: str) -> None:
        """Ends this process and those that it has started."""
        self.end_children()
        show_cursor()
        os.write(2, f"moeloom: {lost}\n".encode())
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)


def _ended(code: int) -> str:
    """How a process ended, from its exit code."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
