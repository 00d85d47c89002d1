"""The ranks that exchange rows: one group of them, or with several nodes one group between and one inside nodes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from core.contracts.dispatcher import Placement

_SUBGROUPS: "WeakKeyDictionary[dist.ProcessGroup, dict[int, tuple[dist.ProcessGroup, ...]]]"
_SUBGROUPS = WeakKeyDictionary()
"""The groups between and inside nodes, by the group of all ranks and the ranks per node: layers share them."""


@dataclass(frozen=True)
class Peers:
    """The ranks of one exchange and what they are for.

    Args:
        name: `between_nodes` or `inside_node`.
        group: their process group.
        rank_E: the rank of the group that the rows of each expert are sent to.
        remote_R: whether each rank of the group is on another node than this one.
        own: this rank's place in the group.
    """

    name: str
    group: dist.ProcessGroup
    rank_E: tuple[int, ...]
    remote_R: tuple[bool, ...]
    own: int
    _tables: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.remote_R)

    def ranks_of(self, expert_A: Tensor) -> Tensor:
        """The rank that each expert's rows are sent to, int64."""
        return _looked_up(self._tables, self.rank_E, expert_A)


@dataclass(frozen=True)
class Layout:
    """Where experts are, as one rank sees it.

    Args:
        exchanges: the exchanges that a row goes through, in order.
        own_experts: how many experts this rank holds.
        index_E: the index of each expert among those of its rank.
    """

    exchanges: tuple[Peers, ...]
    own_experts: int
    index_E: tuple[int, ...]
    _tables: dict[torch.device, Tensor] = field(default_factory=dict)

    def index_of(self, expert_A: Tensor) -> Tensor:
        """The index of each expert among those of its rank, int64."""
        return _looked_up(self._tables, self.index_E, expert_A)


def _looked_up(
    tables: dict[torch.device, Tensor], values_E: Sequence[int], expert_A: Tensor
) -> Tensor:
    """An entry of a table for each assignment; the table is copied to a device once."""
    device = expert_A.device
    if device not in tables:
        tables[device] = torch.tensor(values_E, dtype=torch.int64, device=device)
    return tables[device].index_select(0, expert_A)


def layout(mesh: DeviceMesh, placement: Placement, experts: int) -> Layout:
    """Finds where experts are, and makes the process groups of the exchanges; all ranks call it in the same order.

    Args:
        mesh: the ranks, in one dimension.
        placement: where each expert is.
        experts: how many the layer has.

    Raises:
        ValueError: an expert has no place or several, or the ranks do not fill whole nodes.
    """
    everyone = _group_of(mesh)
    ranks = everyone.size()
    per_node = _ranks_per_node(placement, ranks)
    rank_E = _rank_of_experts(placement, ranks, experts)
    index_E = [0] * experts
    for row in placement.experts_RS:
        for index, expert in enumerate(row):
            index_E[expert] = index
    own = dist.get_rank(everyone)
    exchanges: tuple[Peers, ...]
    if per_node in (1, ranks):
        name = "inside_node" if per_node == ranks else "between_nodes"
        remote_R = tuple(rank // per_node != own // per_node for rank in range(ranks))
        exchanges = (Peers(name, everyone, rank_E, remote_R, own),)
    else:
        exchanges = _two_exchanges(everyone, rank_E, per_node)
    return Layout(exchanges, len(placement.experts_RS[own]), tuple(index_E))


def _two_exchanges(
    everyone: dist.ProcessGroup, rank_E: tuple[int, ...], per_node: int
) -> tuple[Peers, Peers]:
    """The exchange with the ranks of the same place in other nodes, and the one with the ranks of this node."""
    if per_node not in (known := _SUBGROUPS.setdefault(everyone, {})):
        known[per_node] = _make_groups(everyone, per_node)
    between, inside = known[per_node]
    node, place = divmod(dist.get_rank(everyone), per_node)
    nodes = everyone.size() // per_node
    return (
        Peers(
            "between_nodes",
            between,
            tuple(rank // per_node for rank in rank_E),
            tuple(other != node for other in range(nodes)),
            node,
        ),
        Peers(
            "inside_node",
            inside,
            tuple(rank % per_node for rank in rank_E),
            (False,) * per_node,
            place,
        ),
    )


def _make_groups(everyone: dist.ProcessGroup, per_node: int) -> tuple[dist.ProcessGroup, ...]:
    """Makes this rank's group between nodes, then the one inside its node; only their members take part."""
    global_R = dist.get_process_group_ranks(everyone)
    node, place = divmod(dist.get_rank(everyone), per_node)
    backend = dist.get_backend_config(everyone)
    made = []
    for members in (global_R[place::per_node], global_R[node * per_node : (node + 1) * per_node]):
        group = dist.new_group(members, backend=backend, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        made.append(group)
    return tuple(made)


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of a mesh of one dimension."""
    if mesh.ndim != 1:
        raise ValueError(f"the mesh of experts must have one dimension, not {mesh.ndim}")
    group = mesh.get_group()
    global_R = dist.get_process_group_ranks(group)
    if mesh.mesh.tolist() != global_R:
        raise ValueError(f"the ranks of the mesh must be in the order of their group, {global_R}")
    return group


def _ranks_per_node(placement: Placement, ranks: int) -> int:
    """The number of ranks per node, at most all of them."""
    per_node = min(placement.ranks_per_node, ranks)
    if per_node < 1 or ranks % per_node:
        raise ValueError(
            f"ranks_per_node must divide the {ranks} ranks of the experts, "
            f"and {placement.ranks_per_node} does not"
        )
    return per_node


def _rank_of_experts(placement: Placement, ranks: int, experts: int) -> tuple[int, ...]:
    """The rank of each expert."""
    if len(placement.experts_RS) != ranks:
        raise ValueError(
            f"{len(placement.experts_RS)} ranks have experts, and the mesh has {ranks}"
        )
    holder: dict[int, int] = {}
    for rank, row in enumerate(placement.experts_RS):
        for expert in row:
            if not 0 <= expert < experts:
                raise ValueError(f"rank {rank} has expert {expert}, and the layer has {experts}")
            if expert in holder:
                both = f"ranks {holder[expert]} and {rank}"
                raise ValueError(f"expert {expert} must be in one place, and is on {both}")
            holder[expert] = rank
    for expert in range(experts):
        if expert not in holder:
            raise ValueError(f"expert {expert} must be in one place, and is on no rank")
    return tuple(holder[expert] for expert in range(experts))
