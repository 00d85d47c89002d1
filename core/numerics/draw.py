"""Random numbers whose seeds are made from names, so that no draw depends on another one.

Initial weights are drawn this way (`core.model.initialise`), and random choices in layers (`core.routing.chance`).
"""

import hashlib

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
        weight.to_local().copy_(local_part(drawn, weight))
    else:
        weight.copy_(drawn)


@torch.no_grad()
def draw_stack(weight: Tensor, std: float, *, first: int = 0) -> None:
    """Fills a stack of matrices from N(0, std), each from a generator seeded by the current seed and its number.

    If the stack is sharded along its first axis, each rank draws its own matrices and no other; along another one, it
    draws every matrix of the stack and keeps its own part of each.

    Args:
        weight: [groups, out, in].
        std: standard deviation.
        first: the number of the stack's first matrix; not 0 where the rest of the stack is on other ranks.
    """
    if weight.is_meta:
        return
    seed = torch.initial_seed()
    numbers = torch.arange(first, first + len(weight))
    if not isinstance(weight, DTensor):
        for number, matrix in zip(numbers.tolist(), weight.detach(), strict=True):
            draw_normal(matrix, std, seed=address(seed, str(number)))
        return
    own = weight.to_local()
    whole = torch.empty(weight.shape[1:], dtype=torch.float32, device=own.device)
    for number, matrix in zip(local_part(numbers, weight).tolist(), own.detach(), strict=True):
        draw_normal(whole, std, seed=address(seed, str(number)))
        matrix.copy_(local_part(whole[None], weight, from_axis=1)[0])


def local_part(whole: Tensor, weight: DTensor, *, from_axis: int = 0) -> Tensor:
    """This rank's part of a tensor, along the axes in which a weight is sharded.

    Args:
        whole: a tensor of the weight's shape, or of its first axes.
        weight: the sharded weight.
        from_axis: the first axis along which a part is taken.
    """
    for mesh_dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard) and from_axis <= placement.dim < whole.ndim:
            parts = whole.chunk(weight.device_mesh.size(mesh_dim), dim=placement.dim)
            rank = weight.device_mesh.get_local_rank(mesh_dim)
            if rank < len(parts):
                whole = parts[rank]
            else:
                whole = parts[0].narrow(placement.dim, 0, 0)
    return whole
