"""The processes of a run's ranks: started by the first one, and ended together.

Lightning ends the first rank by SIGKILL if another one fails, without a word, and leaves the others waiting if the
first one is killed. Here every rank watches the others (`core.training.rank_watch`).
"""

import os
import socket
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from core.contracts.errors import Interrupted, RunFailed, UserError
from core.training.heartbeats import DONE, FAILED, FOLLOWS, Heartbeats
from core.training.launchers import FIRST_RANK, Launch
from core.training.rank_logs import FIRST_STDERR, open_log
from core.training.rank_watch import RankLost, RankWatch


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
    """Starts the other ranks, and watches over them while a function runs.

    Args:
        environment: this rank among the others.
        folder: the run folder, with the logs of the ranks.
        timeout: how long a collective waits for a rank; None: as long as torch decides.
    """

    def __init__(
        self, environment: RunEnvironment, folder: Path, timeout: timedelta | None = None
    ) -> None:
        launch = environment.launch
        super().__init__(environment, launch.ranks_per_node, launch.nodes)
        self.environment = environment
        self.folder = folder
        self.timeout = timeout

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kw: Any
    ) -> Any:
        """Calls the function in every rank.

        Raises:
            RankLost: another rank ended before the function did.
        """
        environment = self.environment
        launch = environment.launch
        if not environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        beats = Heartbeats(launch, environment.main_address, environment.main_port)
        watch = RankWatch(launch, self.procs, beats, self.folder, self.timeout)
        watch.start()
        state = FAILED
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                self._start_process_group(trainer.strategy)
            result = function(*args, **kw)
            state = DONE
            return result
        except Interrupted:
            state = DONE
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except (RunFailed, UserError):
            watch.end_children()
            raise
        except Exception as error:
            lost = watch.reason_of(error)
            watch.end_children()
            if lost is None:
                raise
            state = FOLLOWS
            raise RankLost(lost) from error
        finally:
            watch.stop()
            beats.end(state)

    def _start_process_group(self, strategy: Any) -> None:
        """Starts the process group of torchrun's ranks, with keys of its own for each attempt in the agent's store.

        Otherwise torch finds the addresses of ranks there that the agent has ended. Lightning takes the group as it is.
        """
        launch = self.environment.launch
        timeout = self.timeout or timedelta(minutes=30)
        address, port = self.environment.main_address, self.environment.main_port
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, timeout=timeout, wait_for_workers=False
        )
        attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        device = strategy.root_device
        dist.init_process_group(
            strategy._get_process_group_backend(),
            store=dist.PrefixStore(attempt, store),  # type: ignore[attr-defined]
            rank=launch.rank,
            world_size=launch.world,
            timeout=timeout,
            device_id=None if device.type == "cpu" else device,
        )

    def _call_children_scripts(self) -> None:
        """Starts the other ranks of this machine, each with a log of its own for what it prints."""
        environment = self.environment
        world = environment.launch.world
        os.environ[FIRST_RANK] = str(os.getpid())
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        command = _basic_subprocess_cmd()
        first_stderr = os.dup(2)
        for rank in range(1, world):
            variables = {**os.environ, "LOCAL_RANK": str(rank)}
            inherited: tuple[int, ...] = ()
            if rank == 1:
                variables[FIRST_STDERR] = str(first_stderr)
                inherited = (first_stderr,)
            log = open_log(self.folder, Launch(rank, world))
            process = subprocess.Popen(
                command, env=variables, stdout=log, stderr=log, pass_fds=inherited
            )
            os.close(log)
            self.procs.append(process)
        os.close(first_stderr)
