"""How much a forward keeps for its backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[], object], module: nn.Module) -> int:
    """The bytes that a forward saves for its backward, without the module's weights; a storage counts once.

    Args:
        forward: runs the forward.
        module: owner of the weights.
    """
    owned = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    sizes: dict[int, int] = {}
    saved: list[Tensor] = []  # storages that are freed would give their addresses to others

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            sizes[storage.data_ptr()] = storage.nbytes()
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())
