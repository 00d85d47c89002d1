"""Random numbers whose seeds are made from names, so that no draw depends on another one.

Initial weights are drawn this way (`core.model.initialise`), and random choices in layers (`core.routing.chance`).
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def address(seed: int, name: str) -> int:
    """A 63-bit seed for a name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def draw_normal(weight: Tensor, std: float, *, seed: int | None = None) -> None:
    """Fills a weight from N(0, std), drawn in fp32 so that every number format starts from the same model.

    If the weight is sharded, each rank draws all numbers and keeps its own part of them.

    Args:
        weight: any shape; nothing is done on the meta device.
        seed: seed of a generator for this weight; None draws from torch's.
    """
    if weight.is_meta:
        return
    generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    drawn.normal_(std=std, generator=generator)
    if isinstance(weight, DTensor):
        weight.to_local().copy_(own_part(drawn, weight))
    else:
        weight.copy_(drawn)


@torch.no_grad()
def draw_stack(weight: Tensor, std: float) -> None:
    """Fills a stack of matrices from N(0, std), each from a generator seeded by the current seed and its index.

    If the stack is sharded along its first axis, each rank draws its own matrices and no other.

    Args:
        weight: [groups, out, in].
        std: standard deviation.
    """
    if weight.is_meta:
        return
    seed = torch.initial_seed()
    own: Tensor = weight
    indices: Iterable[int] = range(len(weight))
    if isinstance(weight, DTensor):
        assert all(p.is_shard(0) or p.is_replicate() for p in weight.placements), weight.placements
        own = weight.to_local()
        indices = own_part(torch.arange(len(weight)), weight).tolist()
    for index, matrix in zip(indices, own.detach(), strict=True):
        draw_normal(matrix, std, seed=address(seed, str(index)))


def own_part(whole: Tensor, weight: DTensor) -> Tensor:
    """This rank's part of a tensor that has a sharded weight's shape, or its first axes."""
    for mesh_dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            parts = whole.chunk(weight.device_mesh.size(mesh_dim), dim=placement.dim)
            rank = weight.device_mesh.get_local_rank(mesh_dim)
            if rank < len(parts):
                whole = parts[rank]
            else:
                whole = parts[0].narrow(placement.dim, 0, 0)
    return whole
