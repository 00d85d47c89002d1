"""Sums of gradients, gathers of weights and the optimizer: what a rank does besides its micro-batches."""

from dataclasses import dataclass

from core.cluster.cluster_file import Cluster
from core.cluster.work import Work

GRADIENT_BYTES = 4
"""Bytes of a gradient that is summed over ranks."""

WORKING_BYTES = 2
"""Bytes of a weight that is sent to the ranks that use it."""


@dataclass(frozen=True)
class Weights:
    """Weights that a GPU holds, by how they are divided.

    Args:
        dense: those of which every data rank has a copy.
        grouped: those of routed experts, the GPU's share.
    """

    dense: float
    grouped: float


@dataclass(frozen=True)
class SyncSeconds:
    """Seconds outside of micro-batches.

    Args:
        gradients: sums of gradients over ranks, all of them.
        gathers: weights that are sent to the ranks that use them.
        optimizer: the optimizer's and the norm's own kernels.
    """

    gradients: float
    gathers: float
    optimizer: float


def weights_of(works: list[Work], parameters: int, expert_ranks: int) -> Weights:
    """The weights of a rank's stages, of which `parameters` are on the GPU."""
    grouped = 0.0
    for work in works:
        grouped += sum(p.weights for p in work.products if p.groups) / expert_ranks
    return Weights(max(0.0, parameters - grouped), grouped)


def sync_seconds(
    cluster: Cluster, weights: Weights, moment_bytes: float, copies: int
) -> SyncSeconds:
    """Seconds of one step.

    Args:
        cluster: its links, and the layout whose inner strategy decides.
        weights: those of the GPU.
        moment_bytes: bytes of the optimizer's states for one weight.
        copies: copies of every weight in the pipeline (two under DualPipe).
    """
    inner = cluster.layout.strategy.inner
    replicas = inner.ranks // inner.expert_ranks
    per_node = cluster.links.gpus_per_node
    dense_group = (inner.ranks * copies, min(inner.ranks, per_node))
    grouped_group = (replicas * copies, max(1, min(replicas, per_node // inner.expert_ranks)))
    gradients = 0.0
    gathers = 0.0
    owned = 0.0
    counts = ((weights.dense, dense_group), (weights.grouped, grouped_group))
    for count, (ranks, inside) in counts:
        reduced = _collective(cluster, count * GRADIENT_BYTES, ranks, inside)
        gathered = _collective(cluster, count * WORKING_BYTES, ranks, inside)
        if inner.name in ("single", "ddp"):
            gradients += 2 * reduced
            owned += count
        else:
            times = 1
            if inner.name != "zero1":
                times = 2 * (cluster.layout.micro_batches or 1)
            gradients += reduced
            gathers += times * gathered
            owned += count / ranks
    moved = owned * (12 + 2 * moment_bytes)
    speed = cluster.device.bandwidth * cluster.efficiencies.optimizer
    return SyncSeconds(gradients, gathers, moved / speed)


def _collective(cluster: Cluster, size: float, ranks: int, inside: int) -> float:
    """Seconds of a reduce-scatter, or of a gather, of so many bytes: first inside nodes, then between them.

    Args:
        ranks: ranks of the group.
        inside: how many of them are in one node.
    """
    links, known = cluster.links, cluster.efficiencies
    nodes = max(1, ranks // inside)
    near = size * (inside - 1) / inside / (links.inside * known.inside)
    far = size / inside * (nodes - 1) / nodes / (links.between * known.between)
    return near + far
