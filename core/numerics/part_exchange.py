"""Parts of sharded weights: which part a rank owns, and how one rank that has a whole tensor sends the parts."""

from collections import Counter, deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

IN_FLIGHT = 2**30
"""Bytes that a rank sends at a time before it waits for the oldest of them."""


def local_part(whole: Tensor, weight: DTensor, *, from_axis: int = 0) -> Tensor:
    """This rank's part of a tensor, along the axes in which a weight is sharded.

    Args:
        whole: a tensor of the weight's shape, or of its first axes.
        weight: the sharded weight.
        from_axis: the first axis along which a part is taken.
    """
    coordinate = weight.device_mesh.get_coordinate()
    assert coordinate is not None
    return _part_at(coordinate, whole, weight, from_axis)


def part_of(whole: Tensor, weight: DTensor, rank: int, *, from_axis: int = 0) -> Tensor:
    """The part of a tensor that a rank owns; the arguments are those of `local_part`.

    Args:
        rank: a rank of the weight's mesh, by its number in the run.
    """
    coordinate: list[int] = (weight.device_mesh.mesh == rank).nonzero()[0].tolist()
    return _part_at(coordinate, whole, weight, from_axis)


def _part_at(coordinate: Sequence[int], whole: Tensor, weight: DTensor, from_axis: int) -> Tensor:
    """The part of a tensor at a place of the mesh."""
    for mesh_dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard) and from_axis <= placement.dim < whole.ndim:
            parts = whole.chunk(weight.device_mesh.size(mesh_dim), dim=placement.dim)
            number = coordinate[mesh_dim]
            if number < len(parts):
                whole = parts[number]
            else:
                whole = parts[0].narrow(placement.dim, 0, 0)
    return whole


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has, without a gradient; it shares its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def ranks_of(weight: DTensor) -> list[int]:
    """The ranks over which a weight is sharded, by their numbers in the run."""
    ranks: list[int] = weight.device_mesh.mesh.flatten().tolist()
    return ranks


class PartExchange:
    """Sends parts of initial weights between ranks.

    Weights are drawn on CPUs, so gloo carries them, whatever the backend of the run is. Sends and receives go on in the
    background until `wait`. Two ranks must send and receive in the same order. Receives never wait, so the rank that
    has come least far finds a receiver for everything that it sends, and no two ranks wait for each other.

    All ranks of the run make the exchange together.

    Attributes:
        rank: the number of this process.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo")
        self._drawn: dict[tuple[int, ...], dict[int, int]] = {}
        self._tags_sent: Counter[int] = Counter()
        self._tags_received: Counter[int] = Counter()
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._bytes_sent = 0
        self._received: list[tuple[dist.Work, Tensor, Tensor]] = []

    def next_owner(self, ranks: Sequence[int], numbers: int) -> int:
        """The rank that draws next: the one that has drawn least.

        Args:
            ranks: those that share what is drawn; each of them calls this, and gets the same answer.
            numbers: how many numbers it draws.
        """
        drawn = self._drawn.setdefault(tuple(ranks), dict.fromkeys(ranks, 0))
        owner = min(drawn, key=drawn.__getitem__)
        drawn[owner] += numbers
        return owner

    def send(self, part: Tensor, rank: int) -> None:
        """Sends a part to a rank, nothing if it is empty; waits for the oldest ones where `IN_FLIGHT` bytes wait."""
        if not part.numel():
            return
        part = part.contiguous()
        self._tags_sent[rank] += 1
        work = dist.isend(part, rank, group=self._group, tag=self._tags_sent[rank])
        assert work is not None
        self._sent.append((work, part))
        self._bytes_sent += part.nbytes
        while self._bytes_sent > IN_FLIGHT:
            self._wait_for_oldest()

    def receive(self, target: Tensor, rank: int) -> None:
        """Fills a part with what a rank sends, some time before `wait` returns."""
        if not target.numel():
            return
        buffer = target
        if not target.is_contiguous():
            buffer = torch.empty_like(target, memory_format=torch.contiguous_format)
        self._tags_received[rank] += 1
        work = dist.irecv(buffer, rank, group=self._group, tag=self._tags_received[rank])
        assert work is not None
        self._received.append((work, buffer, target))

    def wait(self) -> None:
        """Waits until all parts have been sent and received."""
        for work, buffer, target in self._received:
            work.wait()
            if buffer is not target:
                target.copy_(buffer)
        self._received.clear()
        while self._sent:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        """Waits until the part that was sent first has arrived."""
        work, part = self._sent.popleft()
        work.wait()
        self._bytes_sent -= part.nbytes

    def close(self) -> None:
        """Waits until every rank has all of its parts, and ends the process group."""
        self.wait()
        dist.barrier(self._group)
        dist.destroy_process_group(self._group)
