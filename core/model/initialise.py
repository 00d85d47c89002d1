"""Initial weights by address: each module draws from a generator seeded by (seed, module name).

Swapping one part of a model therefore leaves every other initial weight as it was, whatever the order in
which modules are built.
"""

import hashlib

import torch
from torch import Tensor, nn


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


def initialise(model: nn.Module, seed: int) -> None:
    """Reset every module that owns parameters or buffers, each under its own seed.

    Raises:
        TypeError: a module owns some and has no `reset_parameters`, so a model built on the meta device
            could not be given values.
    """
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)) + list(module.buffers(recurse=False)):
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise TypeError(f"{name} ({type(module).__name__}) owns parameters or buffers but has no reset_parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(address(seed, name))
            reset()
