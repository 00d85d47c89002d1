"""Which experts get replicas, and which GPU holds which of them: the greedy balancing of DeepSeek's EPLB.

Two rules, both greedy. Replicas: the next one goes to the expert whose load for each of its replicas is the largest.
Packing: items by falling weight, each to the lightest pack that still has a free place.

With several nodes and groups of experts, groups are packed to nodes first, so that a token whose router limits its
groups reaches few nodes; replicas are then made inside a node, and physical experts packed to the node's GPUs.
Otherwise all experts are balanced at once. Source: the description in the README of github.com/deepseek-ai/EPLB, and
the DeepSeek-V3 report (arXiv 2412.19437), section 3.4.1.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.contracts.errors import UserError


@dataclass(frozen=True)
class Deployment:
    """The machines that experts are placed on.

    Args:
        gpus: GPUs over which the experts of a layer are divided.
        nodes: machines, with equally many GPUs each.
        replicas: physical experts of a layer, the originals included; equally many on each GPU.
        groups: groups of neighbouring experts of which a token reaches some only.
    """

    gpus: int
    nodes: int = 1
    replicas: int = 1
    groups: int = 1

    @property
    def slots(self) -> int:
        """Physical experts of a layer on each GPU."""
        return self.replicas // self.gpus

    @property
    def is_hierarchical(self) -> bool:
        """Whether groups are packed to nodes."""
        return self.groups % self.nodes == 0

    def check(self, experts: int) -> None:
        """Checks the sizes for a layer.

        Args:
            experts: logical experts of the layer.

        Raises:
            UserError: the first size that is impossible.
        """
        for name, value in (
            ("gpus", self.gpus),
            ("nodes", self.nodes),
            ("replicas", self.replicas),
            ("groups", self.groups),
        ):
            if value < 1:
                raise UserError(f"{name} = {value}: must be at least 1")
        if self.gpus % self.nodes:
            raise UserError(f"gpus = {self.gpus}: must be a multiple of nodes = {self.nodes}")
        if self.replicas % self.gpus:
            raise UserError(
                f"replicas = {self.replicas}: must be a multiple of gpus = {self.gpus}, so that every GPU has "
                "equally many experts"
            )
        if self.replicas < experts:
            raise UserError(
                f"replicas = {self.replicas}: must be at least the {experts} experts of a layer, because each of "
                "them needs a place"
            )
        if experts % self.groups:
            raise UserError(f"groups = {self.groups}: must divide the {experts} experts of a layer")


@dataclass(frozen=True)
class LayerPlacement:
    """The physical experts of one layer, GPU by GPU.

    P physical experts, E logical ones.

    Args:
        expert_P: the logical expert that each physical one is a copy of.
        replica_P: which copy of its expert each is, in the order in which they were made; 0 is the original.
        experts: E.
    """

    expert_P: tuple[int, ...]
    replica_P: tuple[int, ...]
    experts: int

    @property
    def counts(self) -> list[int]:
        """How many copies each expert has, the original included."""
        count_E = [0] * self.experts
        for expert in self.expert_P:
            count_E[expert] += 1
        return count_E

    @property
    def physical_experts(self) -> list[list[int]]:
        """The physical experts of each logical one, in the order in which they were made."""
        physical_E: list[list[int]] = [[0] * count for count in self.counts]
        for physical, (expert, replica) in enumerate(
            zip(self.expert_P, self.replica_P, strict=True)
        ):
            physical_E[expert][replica] = physical
        return physical_E

    def load_of_gpus(self, load_E: Sequence[float], gpus: int) -> list[float]:
        """The load of each GPU if the copies of an expert share its load equally.

        Args:
            load_E: the load of each logical expert.
            gpus: how many GPUs hold the physical experts, in order and equally many each.
        """
        count_E = self.counts
        slots = len(self.expert_P) // gpus
        load_G = [0.0] * gpus
        for physical, expert in enumerate(self.expert_P):
            load_G[physical // slots] += load_E[expert] / count_E[expert]
        return load_G


def place_layer(load_E: Sequence[float], deployment: Deployment) -> LayerPlacement:
    """Plans replicas and places of one layer's experts.

    Args:
        load_E: the load of each expert, an estimate of what it will be.
        deployment: the machines; its sizes are checked.

    Raises:
        UserError: sizes that are impossible for this layer, or a load that is no number from 0.
    """
    experts = len(load_E)
    deployment.check(experts)
    for expert, load in enumerate(load_E):
        if not 0 <= load < math.inf:
            raise UserError(f"the load of expert {expert} is {load}: must be a number from 0")
    groups, nodes = deployment.groups, deployment.nodes
    if not deployment.is_hierarchical:
        groups, nodes = 1, 1
    members_N = _experts_of_nodes(load_E, groups, nodes)
    expert_P: list[int] = []
    replica_P: list[int] = []
    for members in members_N:
        node = _place_in_node(
            [load_E[expert] for expert in members],
            deployment.replicas // nodes,
            deployment.gpus // nodes,
        )
        expert_P += [members[index] for index, _ in node]
        replica_P += [replica for _, replica in node]
    return LayerPlacement(tuple(expert_P), tuple(replica_P), experts)


def _experts_of_nodes(load_E: Sequence[float], groups: int, nodes: int) -> list[list[int]]:
    """The experts of each node, whole groups of neighbours."""
    size = len(load_E) // groups
    group_load = [sum(load_E[first : first + size]) for first in range(0, len(load_E), size)]
    members_N = []
    for packed in balanced_packing(group_load, nodes):
        members: list[int] = []
        for group in packed:
            members += range(group * size, (group + 1) * size)
        members_N.append(members)
    return members_N


def _place_in_node(load_E: Sequence[float], replicas: int, gpus: int) -> list[tuple[int, int]]:
    """The physical experts of a node, GPU by GPU: the index of the expert, and which copy of it."""
    made = replicate(load_E, replicas)
    count_E = [0] * len(load_E)
    for expert, _ in made:
        count_E[expert] += 1
    weights = [load_E[expert] / count_E[expert] for expert, _ in made]
    placed = []
    for packed in balanced_packing(weights, gpus):
        placed += [made[index] for index in packed]
    return placed


def replicate(load_E: Sequence[float], replicas: int) -> list[tuple[int, int]]:
    """Makes physical experts: each expert once, then one copy after another of the expert that needs it most.

    No other choice of copies has a smaller largest load of a copy.

    Args:
        load_E: the load of each expert.
        replicas: how many physical experts there are to be, at least as many as experts.

    Returns:
        For each the expert, and which copy of it: the originals first, then copies in the order of their making.
    """
    made = [(expert, 0) for expert in range(len(load_E))]
    # Experts without any load are copied in turn, and only once no other can be.
    queue = [(-load, 0.0 if load else 1.0, expert, 1) for expert, load in enumerate(load_E)]
    heapq.heapify(queue)
    for _ in range(replicas - len(load_E)):
        _, _, expert, count = heapq.heappop(queue)
        made.append((expert, count))
        load = load_E[expert]
        turn = 0.0 if load else count + 1.0
        heapq.heappush(queue, (-load / (count + 1), turn, expert, count + 1))
    return made


def balanced_packing(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Divides items over packs of equally many, as evenly as a greedy choice can.

    The heaviest pack exceeds the mean by at most (1 - 1 / packs) of the largest weight.

    Args:
        weights: the weight of each item, at least 0.
        packs: must divide the number of items.

    Returns:
        The items of each pack, in the order in which they were put there.
    """
    capacity = len(weights) // packs
    assert capacity * packs == len(weights)
    if capacity == 1:
        return [[item] for item in range(packs)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    lightest = [(0.0, pack) for pack in range(packs)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        load, pack = heapq.heappop(lightest)
        packed[pack].append(item)
        if len(packed[pack]) < capacity:
            heapq.heappush(lightest, (load + weights[item], pack))
    return packed
