"""Steps of an optimizer on small weights, to see what it keeps before a run begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins.torch_optimizer.arguments import make

SHAPES = {1: (3,), 2: (5, 3), 3: (2, 5, 3)}
"""A shape for each number of axes; lengths differ, so that an axis of a state is known by its length."""


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that an optimizer keeps for a weight.

    Args:
        axes: the axis of the weight that has the length of each axis; -1: its length is 1; None: no axis has it.
        bytes: the bytes of one number; 0: as many as the weight's.
    """

    axes: tuple[int | None, ...]
    bytes: int

    def bytes_for(self, weight: Tensor) -> int:
        """The bytes that it takes beside a weight."""
        size = self.bytes or weight.element_size()
        for axis in self.axes:
            if axis is not None and axis >= 0:
                size *= weight.shape[axis]
        return size


def kept_states(
    algorithm: str, arguments: Mapping[str, Any], axes: int
) -> tuple[list[KeptTensor], list[str]]:
    """What an optimizer keeps for a weight after two steps.

    Args:
        algorithm: the class.
        arguments: its constructor's.
        axes: how many axes the weight has.

    Returns:
        Its tensors, and the names of what is neither a tensor nor a number, which a checkpoint cannot hold.

    Raises:
        ValueError, RuntimeError: the class cannot update such a weight.
    """
    weight = torch.nn.Parameter(torch.ones(SHAPES[axes]))
    optimizer = make(algorithm, [weight], arguments)
    for step in range(2):
        weight.grad = torch.full_like(weight, 0.5 + step)
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
    kept = []
    strange = []
    for name, value in optimizer.state[weight].items():
        if isinstance(value, Tensor):
            own = 0 if value.dtype == weight.dtype else value.element_size()
            kept.append(KeptTensor(_axes_of(value.shape, weight.shape), own))
        elif type(value) not in (int, float, bool):
            strange.append(str(name))
    return kept, strange


def _axes_of(shape: Sequence[int], whole: Sequence[int]) -> tuple[int | None, ...]:
    """The axis of a weight that each axis of a state belongs to."""
    places = {length: axis for axis, length in enumerate(whole)}
    return tuple(-1 if length == 1 else places.get(length) for length in shape)
