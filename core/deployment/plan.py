"""A placement plan: the physical experts of every layer, as a file that other programs read too."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.deployment.balancing import Deployment, LayerPlacement, place_layer
from core.deployment.loads import RecordedLoads
from core.model.trace import Trace
from core.storage.documents import read_bytes


@dataclass(frozen=True)
class PlacementPlan:
    """Where the physical experts of every layer are.

    Args:
        gpus: GPUs that hold them, equally many each.
        nodes: machines of these GPUs.
        layers: the placement of each layer, by the path of its block.
    """

    gpus: int
    nodes: int
    layers: dict[str, LayerPlacement]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain containers, with the three tables that EPLB returns.

        For every layer `phy2log` is the logical expert of each physical one, `log2phy` the physical experts of each
        logical one, padded by -1, and `logcnt` how many these are.
        """
        placements = list(self.layers.values())
        most = max(max(placement.counts) for placement in placements)
        log2phy = []
        for placement in placements:
            rows = placement.physical_experts
            log2phy.append([[*row, *[-1] * (most - len(row))] for row in rows])
        return {
            "gpus": self.gpus,
            "nodes": self.nodes,
            "layers": list(self.layers),
            "phy2log": [list(placement.expert_P) for placement in placements],
            "log2phy": log2phy,
            "logcnt": [placement.counts for placement in placements],
        }


def plan_placement(
    loads: RecordedLoads | Trace | Mapping[str, Sequence[float]],
    *,
    gpus: int = 8,
    nodes: int = 1,
    replicas: int | None = None,
    groups: int | None = None,
) -> PlacementPlan:
    """Plans replicas and places for every layer.

    Args:
        loads: recorded loads, what `core.trace` returned, or the load of each expert by the path of its block.
        gpus: GPUs over which the experts of a layer are divided.
        nodes: machines with equally many of them.
        replicas: physical experts of a layer, the originals included; None: one more on each GPU than are needed.
        groups: groups of experts of which a token reaches some only; None: as the loads say, else 1.

    Raises:
        UserError: sizes that are impossible for a layer, or loads that are none.
    """
    if isinstance(loads, Trace):
        loads = RecordedLoads.of_traces([loads])
    if isinstance(loads, RecordedLoads):
        groups = loads.groups if groups is None else groups
        loads = loads.between(0, len(loads.at))
    deployment = Deployment(gpus, nodes, replicas or 0, 1 if groups is None else groups)
    layers = {}
    for path, load_E in loads.items():
        own = deployment
        if replicas is None:
            own = replace(deployment, replicas=default_replicas(len(load_E), gpus))
        try:
            layers[path] = place_layer(load_E, own)
        except UserError as cause:
            raise UserError(f"{cause} ({path})") from cause
    return PlacementPlan(gpus, nodes, layers)


def default_replicas(experts: int, gpus: int) -> int:
    """Physical experts if every GPU has one more than the even share, as in DeepSeek's prefill units."""
    return (experts // max(gpus, 1) + 1) * gpus


def read_plan(file: Path) -> PlacementPlan:
    """Reads a plan: the document of `core.placement --json`, or any with `gpus`, `layers` and `phy2log`.

    `log2phy` is not read: it only numbers the copies, and `phy2log` says where they are.

    Raises:
        UserError: it cannot be read, or is no plan; the sentence names the key.
    """
    try:
        document: Any = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as cause:
        raise UserError(f"{file}: is no JSON document ({cause})") from cause
    if not isinstance(document, dict):
        raise UserError(f"{file}: must be an object with gpus, layers and phy2log")
    gpus = _size(file, document, "gpus", None)
    nodes = _size(file, document, "nodes", 1)
    if gpus % nodes:
        raise UserError(f"{file}: gpus = {gpus}: must be a multiple of nodes = {nodes}")
    paths = document.get("layers")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths) or not paths:
        raise UserError(f"{file}: layers must be the paths of the layers with experts")
    if len(set(paths)) < len(paths):
        raise UserError(f"{file}: layers names a layer twice")
    tables = document.get("phy2log")
    if not isinstance(tables, list) or len(tables) != len(paths):
        raise UserError(f"{file}: phy2log must have one list for each of the {len(paths)} layers")
    counts = document.get("logcnt", [None] * len(paths))
    if not isinstance(counts, list) or len(counts) != len(paths):
        raise UserError(f"{file}: logcnt must have one list for each of the {len(paths)} layers")
    layers = {}
    for path, expert_P, count_E in zip(paths, tables, counts, strict=True):
        layers[path] = _layer(f"{file}: phy2log of {path}", expert_P, gpus)
        if count_E is not None and count_E != layers[path].counts:
            raise UserError(f"{file}: logcnt of {path} does not count the experts of phy2log")
    return PlacementPlan(gpus, nodes, layers)


def _size(file: Path, document: dict[str, Any], key: str, default: int | None) -> int:
    value = document.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{file}: {key} = {value!r}: must be a whole number from 1")
    return value


def _layer(what: str, expert_P: Any, gpus: int) -> LayerPlacement:
    """A checked layer of a plan."""
    if not isinstance(expert_P, list) or not expert_P:
        raise UserError(f"{what} must be a list of experts")
    for expert in expert_P:
        if type(expert) is not int or not 0 <= expert < len(expert_P):
            raise UserError(f"{what} has {expert!r}: must be the number of an expert, from 0")
    if len(expert_P) % gpus:
        raise UserError(
            f"{what} has {len(expert_P)} physical experts: must be a multiple of gpus = {gpus}"
        )
    experts = max(expert_P) + 1
    seen = [0] * experts
    replica_P = []
    for expert in expert_P:
        replica_P.append(seen[expert])
        seen[expert] += 1
    if not all(seen):
        raise UserError(f"{what} has no place for expert {seen.index(0)}: every expert needs one")
    return LayerPlacement(tuple(expert_P), tuple(replica_P), experts)
