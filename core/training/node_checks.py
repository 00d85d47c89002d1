"""How the tasks of a launcher are spread over machines, compared with the recipe; pure functions of the environment.

Both launchers number the tasks node by node: with 2 nodes of 4 tasks, the second node has ranks 4 to 7.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from core.command import command_prefix
from core.contracts.errors import UserError

_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
"""Variables with the number of nodes; the first that is set counts."""

_SLURM_SHARES = re.compile(r"(\d+)(?:\(x(\d+)\))?")
"""A part of SLURM's list of tasks per node: `4(x2)` stands for two nodes with 4 tasks each."""


@dataclass(frozen=True)
class _Variable:
    """A variable of a launcher, with the value that agrees with the recipe.

    Args:
        name: its name.
        value: the value that it must have.
        why: the reason, as the end of a sentence that begins with "because".
        required: whether it must be set.
    """

    name: str
    value: str
    why: str
    required: bool = False


def no_launcher(ranks: int, nodes: int) -> str:
    """The sentence for a process without a launcher, whose recipe asks for several nodes."""
    command = command_prefix("fit")
    module = command.removeprefix("python -m ")
    each = ranks // nodes
    torchrun = f"torchrun --nnodes={nodes} --node-rank=N --nproc-per-node={each} --master-addr=HOST --master-port=PORT"
    srun = f"srun --nodes={nodes} --ntasks-per-node={each}"
    return (
        f"strategy.nodes = {nodes}: this process cannot start ranks on other machines; run "
        f"`{torchrun} -m {module} RECIPE --out DIR` on each of them, or `{srun} {command} RECIPE --out DIR`"
    )


def check_tasks(
    launcher: str, rank: int, ranks: int, nodes: int, environment: Mapping[str, str]
) -> None:
    """Compares a task's variables with the recipe.

    Args:
        launcher: the program that started the task, torchrun or srun.
        rank: the number of the task.
        ranks: how many tasks there are.
        nodes: the recipe's number of nodes; divides `ranks`.
        environment: the environment variables.

    Raises:
        UserError: another number of nodes, uneven numbers of tasks on them, or tasks that are not numbered node by
            node.
    """
    if launcher == "torchrun":
        variables = _of_torchrun(rank, ranks, nodes)
    else:
        variables = _of_srun(rank, ranks, nodes, environment)
    where = f"strategy.ranks = {ranks}"
    if nodes > 1:
        where = f"{where}, strategy.nodes = {nodes}"
    for variable in variables:
        found = environment.get(variable.name)
        if found == variable.value or (found is None and not variable.required):
            continue
        shown = f"= {found}"
        if found is None:
            shown = "is not set"
        raise UserError(
            f"{where}: {variable.name} {shown} in the environment: must be {variable.value}, because {variable.why}"
        )


def _of_torchrun(rank: int, ranks: int, nodes: int) -> list[_Variable]:
    """The variables of torchrun that agree with the recipe."""
    each = ranks // nodes
    node, local_rank = divmod(rank, each)
    count = _count_reason(nodes)
    share = _share_reason(ranks, nodes)
    numbered = f"rank {rank} is number {local_rank} of the ranks of node {node}"
    if nodes == 1:
        share = count
        numbered = count
    return [
        _Variable("GROUP_WORLD_SIZE", str(nodes), count),
        _Variable("LOCAL_WORLD_SIZE", str(each), share, required=nodes > 1),
        _Variable("LOCAL_RANK", str(local_rank), numbered, required=True),
        _Variable("GROUP_RANK", str(node), numbered),
    ]


def _of_srun(rank: int, ranks: int, nodes: int, environment: Mapping[str, str]) -> list[_Variable]:
    """The variables of srun that agree with the recipe."""
    several = nodes > 1
    each = ranks // nodes
    node, local_rank = divmod(rank, each)
    count = _count_reason(nodes)
    name = next((name for name in _SLURM_NODES if name in environment), "SLURM_NNODES")
    variables = [_Variable(name, str(nodes), count, required=several)]
    shares = "SLURM_STEP_TASKS_PER_NODE"
    if shares in environment and _shares(environment[shares]) != [each] * nodes:
        expected = f"{each}(x{nodes})" if several else str(each)
        share = f"{_share_reason(ranks, nodes)} (srun --ntasks-per-node={each})"
        variables.append(_Variable(shares, expected, share))
    if several and each > 1 and environment.get("SLURM_DISTRIBUTION", "").startswith("cyclic"):
        block = "ranks are numbered node by node (srun --distribution=block)"
        variables.append(_Variable("SLURM_DISTRIBUTION", "block", block))
    numbered = (
        f"rank {rank} is number {local_rank} of the ranks of node {node}, as ranks are numbered node by node "
        "(srun --distribution=block)"
    )
    variables.append(_Variable("SLURM_NODEID", str(node), numbered, required=several))
    variables.append(_Variable("SLURM_LOCALID", str(local_rank), numbered, required=several))
    return variables


def _count_reason(nodes: int) -> str:
    """Why there may be no other number of nodes."""
    if nodes == 1:
        return "all ranks work on one machine (strategy.nodes = 1)"
    return f"the recipe asks for {nodes} nodes"


def _share_reason(ranks: int, nodes: int) -> str:
    """Why there may be no other number of tasks on a node."""
    return f"each node has {ranks} / {nodes} = {ranks // nodes} ranks"


def _shares(text: str) -> list[int]:
    """How many tasks each node has, from SLURM's list; an empty list for what is none."""
    shares: list[int] = []
    for part in text.split(","):
        found = _SLURM_SHARES.fullmatch(part)
        if found is None:
            return []
        shares += [int(found[1])] * int(found[2] or 1)
    return shares
