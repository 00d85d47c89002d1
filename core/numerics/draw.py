"""Random numbers whose seeds are made from names, so that no draw depends on another one.

Initial weights are drawn this way (`core.model.initialise`), and random choices in layers (`core.routing.chance`).
"""

import hashlib

import torch
from torch import Tensor


def address(seed: int, name: str) -> int:
    """A 63-bit seed for a name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def draw_normal(weight: Tensor, std: float, *, seed: int | None = None) -> None:
    """Fill a weight from N(0, std), drawn in fp32 so that every number format starts from the same model.

    Args:
        weight: any shape; nothing is done on the meta device.
        seed: of a generator of its own; None draws from torch's.
    """
    if weight.is_meta:
        return
    generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    weight.copy_(torch.empty_like(weight, dtype=torch.float32).normal_(std=std, generator=generator))
