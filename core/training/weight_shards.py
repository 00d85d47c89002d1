"""The part of each weight that this rank owns, its place in the whole, and how whole tensors are made of parts."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from core.checkpoints.index import first_changed_file
from core.checkpoints.listing import other_checkpoints
from core.checkpoints.shards import ShardReader
from core.checkpoints.tensor_shard import TensorShard
from core.contracts.errors import UserError
from core.numerics.part_exchange import local_part, local_tensor
from core.training.ranks import all_ranks, first_text_over_ranks


@dataclass(frozen=True)
class WeightShard:
    """The part of one weight that this rank owns.

    Args:
        weight: what the model has: a whole weight, or one that is divided.
        first: the number of the part's first matrix; of a stack whose matrices are divided over `experts`.
        matrices: how many matrices the whole stack has; 0 unless they are divided.
        experts: the ranks that hold the matrices of the stack, in their order; None: it is no such stack.
    """

    weight: Tensor
    first: int = 0
    matrices: int = 0
    experts: "dist.ProcessGroup | None" = None

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks own other parts."""
        return self.experts is not None or isinstance(self.weight, DTensor)

    def place(self, part: Tensor) -> TensorShard:
        """A tensor of the form of this rank's part, with its place in the whole.

        Args:
            part: the part of the weight itself, or of a moment in an optimizer.

        Raises:
            UserError: the tensor has another shape.
        """
        expected = local_tensor(self.weight).shape
        if part.shape != expected:
            shapes = f"{list(part.shape)}, and its weight {list(expected)} on this rank"
            raise UserError(
                f"a state of the optimizer has the shape {shapes}: a strategy that shards weights can only save "
                "states of the weight's shape, or scalars"
            )
        offsets = [0] * part.ndim
        shape = list(self.weight.shape)
        if isinstance(self.weight, DTensor):
            offsets = _offsets(self.weight)
        if self.matrices:
            offsets[0] += self.first
            shape[0] = self.matrices
        return TensorShard(part, tuple(offsets), tuple(shape))

    def gather(self, part: Tensor) -> Tensor:
        """Gathers a tensor of the weight's form from its parts; every rank calls this, and gets all of it.

        Args:
            part: this rank's part: of the weight itself, or of a moment in an optimizer.
        """
        weight = self.weight
        if isinstance(weight, DTensor):
            divided = DTensor.from_local(
                part,
                weight.device_mesh,
                weight.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
            part = divided.full_tensor()
        if self.experts is None:
            return part
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.experts))]
        dist.all_gather(parts, part.contiguous(), group=self.experts)
        return torch.cat(parts)

    def shard_of(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor of the weight's form."""
        if self.experts is not None:
            whole = whole.narrow(0, self.first, len(self.weight))
        if isinstance(self.weight, DTensor):
            whole = local_part(whole, self.weight)
        return whole


def weight_shards(
    module: nn.Module, experts: "dist.ProcessGroup | None"
) -> Iterator[tuple[str, WeightShard]]:
    """Yields every weight of a module once, by name, in the order of its modules.

    Args:
        module: a module whose weights have been divided.
        experts: the ranks over which stacks of experts are divided; None: over none.
    """
    known: set[int] = set()
    for path, owner in module.named_modules():
        for name, weight in owner.named_parameters(recurse=False):
            if id(weight) in known:
                continue
            known.add(id(weight))
            full_name = f"{path}.{name}" if path else name
            if getattr(owner, "all_groups", 0) > getattr(owner, "groups", 0):
                first = int(owner.first_group)  # type: ignore[arg-type]
                yield full_name, WeightShard(weight, first, int(owner.all_groups), experts)  # type: ignore[arg-type]
            else:
                yield full_name, WeightShard(weight)


def check_over_ranks(reader: ShardReader, prefix: str = "") -> None:
    """Compares files of a sharded checkpoint with their checksums, each on one of the ranks; every rank calls this.

    Args:
        reader: the checkpoint.
        prefix: only files with tensors whose names begin so are read.

    Raises:
        UserError: one has changed; raised on every rank.
    """
    rank, world = all_ranks()
    changed = first_changed_file(reader.folder, reader.index, prefix, rank=rank, ranks=world)
    changed = first_text_over_ranks(changed)
    if changed:
        raise UserError(f"{changed}{other_checkpoints(reader.folder)}")


def _offsets(weight: DTensor) -> list[int]:
    """The place of the first number of this rank's part of a weight, along each axis."""
    offsets = [0] * weight.ndim
    lengths = list(weight.shape)
    for mesh_dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            length = lengths[placement.dim]
            share = -(-length // weight.device_mesh.size(mesh_dim))
            begin = min(share * weight.device_mesh.get_local_rank(mesh_dim), length)
            offsets[placement.dim] += begin
            lengths[placement.dim] = min(share, length - begin)
    return offsets


@torch.no_grad()
def load_full_state(
    module: nn.Module,
    state: Mapping[str, Any],
    parts: Mapping[str, WeightShard],
    added: Collection[str] = frozenset(),
) -> None:
    """Copies whole tensors into a module, of each divided weight the part that this rank owns.

    Args:
        module: the module, whose weights may be divided.
        state: whole tensors by name; every tensor of the module must be among them.
        parts: the module's weights by name.
        added: names of tensors of the module that are not among them, and keep their values.
    """
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor) or name in added:
            continue
        whole = state[name]
        if name in parts:
            whole = parts[name].shard_of(whole)
        local_tensor(value).copy_(whole)
