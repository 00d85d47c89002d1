"""Initial weights by address: each module draws from a generator seeded by (seed, module name).

Swapping one part of a model therefore leaves every other initial weight as it was, whatever the order in
which modules are built.
"""

import torch
from torch import nn

from core.numerics.draw import address


def initialise(model: nn.Module, seed: int) -> None:
    """Resets every module that owns parameters or buffers, each under its own seed.

    Raises:
        TypeError: a module owns some and has no `reset_parameters`, so a model built on the meta device
            could not be given values.
    """
    for name, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not tensors:
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise TypeError(
                f"{name} ({type(module).__name__}) owns parameters or buffers but has no reset_parameters"
            )
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` seeds every kind of device and keeps a stack trace for each that has not been used
            on_cpu = all(tensor.device.type in ("cpu", "meta") for tensor in tensors)
            if on_cpu:
                torch.default_generator.manual_seed(address(seed, name))
            else:
                torch.manual_seed(address(seed, name))
            reset()
