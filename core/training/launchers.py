"""What started this process, and which rank it is: read from the environment, before torch is imported.

A strategy with one device ignores what a launcher left in the environment. One with several ranks starts the others
itself, unless torchrun or srun has started as many tasks as there are ranks, on one machine or on several. Anything
else is an error.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.training.node_checks import check_tasks, no_launcher

JOINED = "MOELOOM_JOINED_RUN"
"""The environment variable in which the first rank passes the run folder to the ranks that it starts."""

FIRST_RANK = "MOELOOM_FIRST_RANK"
"""The environment variable in which the first rank passes its process id to the ranks that it starts."""

LOOPBACK = "127.0.0.1"
"""The address at which ranks of one machine meet."""


@dataclass(frozen=True)
class Launch:
    """This process among the ranks of a run.

    Args:
        rank: its number, from 0.
        world: how many ranks there are.
        launcher: the program that started every rank; None if the first rank starts the others.
        parent: the process id of the first rank, if that started this one.
        port: the TCP port at which ranks of a launcher meet; 0 if the first rank chooses it.
        local_rank: its number among the ranks of its node, from 0.
        node: the number of its node, from 0.
        nodes: how many nodes there are; each has equally many ranks.
        address: the host at which the ranks meet, or SLURM's list of nodes, the first of which is that host.
    """

    rank: int = 0
    world: int = 1
    launcher: str | None = None
    parent: int | None = None
    port: int = 0
    local_rank: int = 0
    node: int = 0
    nodes: int = 1
    address: str = LOOPBACK

    @property
    def ranks_per_node(self) -> int:
        """How many ranks each node has."""
        return self.world // self.nodes


@dataclass(frozen=True)
class _Launcher:
    """A program that starts tasks, and the variables that it leaves in their environment.

    Args:
        name: the program.
        rank: the variable with the number of the task; without it, the program started nothing.
        world: variables with the number of tasks, the first that is set counts.
        supported: whether its tasks can be the ranks of a run.
    """

    name: str
    rank: str
    world: tuple[str, ...]
    supported: bool = False


_LAUNCHERS = (
    _Launcher("torchrun", "RANK", ("WORLD_SIZE",), supported=True),
    _Launcher("mpirun", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    _Launcher("jsrun", "JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_SIZE",)),
    _Launcher("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), supported=True),
    _Launcher("mpirun", "PMI_RANK", ("PMI_SIZE",)),
)
"""The launchers by precedence: torchrun and mpirun may be started by srun."""

_SLURM_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")
"""Set by srun. The script of a batch job is task 0 too, but it is not one of several tasks."""

_OTHERS = (
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "STANDALONE_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
)
"""Further variables that libraries read."""


def launch_of(strategy: Any, environment: Mapping[str, str] = os.environ) -> Launch:
    """Returns which rank this process is.

    Args:
        strategy: the recipe's section; its component says how many processes and nodes there are.
        environment: the environment variables.

    Raises:
        UserError: a launcher has started several tasks, and they cannot be the ranks; or several nodes are wanted, and
            no launcher has started this process.
    """
    ranks = strategy.component.ranks_of(strategy.config)
    nodes = strategy.component.nodes_of(strategy.config)
    if ranks == 1:
        return Launch()
    if joined_folder(environment) is not None:
        return _joined(ranks, environment)
    launcher = _launcher_in(environment)
    if launcher is not None:
        return _task_of(launcher, ranks, nodes, environment)
    if nodes > 1:
        raise UserError(no_launcher(ranks, nodes))
    return Launch(0, ranks)


def joined_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The run folder of the rank that started this one; None where no rank did."""
    folder = environment.get(JOINED)
    return Path(folder) if folder and FIRST_RANK in environment else None


def is_first_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether no launcher and no other rank has started this process as one after the first."""
    launcher = _launcher_in(environment)
    if joined_folder(environment) is not None:
        return False
    return launcher is None or environment[launcher.rank] == "0"


def check_folder_named(launch: Launch, *, out: Any, resume: str | None) -> None:
    """Raises `UserError` if the tasks of a launcher would have to choose their run folder by themselves."""
    if launch.launcher is not None and out is None and resume in (None, "auto"):
        raise UserError(
            f"--out is missing: the {launch.world} tasks of {launch.launcher} need one name for their run folder"
        )


def launcher_notice(launch: Launch, environment: Mapping[str, str] = os.environ) -> str | None:
    """The sentence for a run on one device that is one of several tasks of a launcher; None if it is not."""
    launcher = _launcher_in(environment)
    if launch.world > 1 or launcher is None:
        return None
    found = f"{launcher.rank} = {environment[launcher.rank]} in the environment is not used"
    return f"{found}: this strategy trains on one device, so each task of {launcher.name} is a run of its own"


def without_launcher(environment: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """The environment without the variables of launchers, which libraries read too; torchrun's stay if it is used."""
    if launch.launcher == "torchrun":
        return dict(environment)
    names = set(_OTHERS)
    for launcher in _LAUNCHERS:
        names.update((launcher.rank, *launcher.world))
    if launch.parent is not None:
        names -= {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"}
    return {name: value for name, value in environment.items() if name not in names}


def _joined(ranks: int, environment: Mapping[str, str]) -> Launch:
    """The rank that the first one has started; another program may have inherited its variables."""
    parent = environment[FIRST_RANK]
    if parent != str(os.getppid()):
        raise UserError(
            f"{FIRST_RANK} = {parent!r} in the environment: is not the process that started this one; "
            "the variable is passed from rank to rank, and must not be set otherwise"
        )
    rank = environment.get("LOCAL_RANK", "")
    if rank not in map(str, range(1, ranks)):
        shown = f"= {rank!r}" if rank else "is not set"
        raise UserError(
            f"LOCAL_RANK {shown} in the environment: must be from 1 to {ranks - 1}, the ranks that the first one starts"
        )
    return Launch(int(rank), ranks, parent=int(parent), local_rank=int(rank))


def _launcher_in(environment: Mapping[str, str]) -> _Launcher | None:
    """The launcher that started this process as one of several tasks; None if there is none."""
    for launcher in _LAUNCHERS:
        if launcher.rank not in environment:
            continue
        rank = environment[launcher.rank]
        in_step = any(name in environment for name in _SLURM_STEP)
        if launcher.name == "srun" and rank == "0" and not in_step:
            continue
        world = _first(launcher.world, environment)
        if world is not None and environment[world] == "1" and rank == "0":
            continue
        return launcher
    return None


def _task_of(launcher: _Launcher, ranks: int, nodes: int, environment: Mapping[str, str]) -> Launch:
    """The rank of a task of a launcher; its tasks must be the ranks."""
    instead = (
        f"start one process, which starts the other ranks, or torchrun or srun with {ranks} tasks"
    )
    if nodes > 1:
        instead = f"start torchrun or srun with {ranks // nodes} tasks on each of {nodes} nodes"
    if not launcher.supported:
        found = f"{launcher.rank} = {environment[launcher.rank]} in the environment"
        raise UserError(
            f"strategy.ranks = {ranks}: {found}: not a task of torchrun or srun; {instead}"
        )
    world = _first(launcher.world, environment)
    rank_value = environment[launcher.rank]
    if world is None or environment[world] != str(ranks):
        found = f"{world} = {environment[world]}" if world else f"{launcher.world[-1]} is not set"
        where = f"and {launcher.rank} = {rank_value} in the environment"
        raise UserError(f"strategy.ranks = {ranks}, but {found} {where}: {instead}")
    if not rank_value.isdecimal() or int(rank_value) >= ranks:
        allowed = f"must be a whole number less than {world} = {ranks}"
        raise UserError(f"{launcher.rank} = {rank_value!r} in the environment: {allowed}")
    rank = int(rank_value)
    check_tasks(launcher.name, rank, ranks, nodes, environment)
    node, local_rank = divmod(rank, ranks // nodes)
    return Launch(
        rank,
        ranks,
        launcher.name,
        port=_port(launcher, environment),
        local_rank=local_rank,
        node=node,
        nodes=nodes,
        address=_address(launcher, nodes, environment),
    )


def _address(launcher: _Launcher, nodes: int, environment: Mapping[str, str]) -> str:
    """The host at which the ranks of a launcher meet, or a list of nodes of SLURM, the first of which is that host.

    Raises:
        UserError: there are several nodes, and no variable says which is the first.
    """
    if launcher.name == "srun" and nodes == 1:
        return LOOPBACK
    names: tuple[str, ...] = ("MASTER_ADDR",)
    if launcher.name == "srun":
        names = ("MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    name = _first(names, environment)
    if name is not None and environment[name]:
        return environment[name]
    if nodes == 1:
        return LOOPBACK
    raise UserError(
        f"strategy.nodes = {nodes}: {name or names[0]} is not set in the environment: must be the address of the "
        "first node, where the ranks meet"
    )


def _port(launcher: _Launcher, environment: Mapping[str, str]) -> int:
    """The port at which the ranks of a launcher meet.

    Raises:
        UserError: torchrun's variable is missing, or not a port.
    """
    given = environment.get("MASTER_PORT")
    if given is None and launcher.name == "srun":
        job = environment.get("SLURM_JOB_ID", "0")
        step = environment.get("SLURM_STEP_ID", "0")
        digits = "".join(character for character in job + step if character.isdecimal())
        return 15000 + int(digits or "0") % 15000
    if given is None:
        raise UserError(
            "MASTER_PORT is not set in the environment: must be the port at which the ranks meet"
        )
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise UserError(
            f"MASTER_PORT = {given!r} in the environment: must be the port at which the ranks meet"
        )
    return int(given)


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
    """The first of some variables that is set."""
    for name in names:
        if name in environment:
            return name
    return None
