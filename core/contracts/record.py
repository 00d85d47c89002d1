"""What a layer saw, returned beside its output and committed once, outside every recomputed region.

Data classes that cross a layer's boundary are registered as pytrees, so that FSDP's hooks, activation
checkpointing and `torch.compile` find the tensors in them.
"""

from dataclasses import dataclass, field, fields
from typing import TypeVar

from torch import Tensor
from torch.utils import _pytree

T = TypeVar("T")


def as_pytree(cls: type[T]) -> type[T]:
    """Register a dataclass as a pytree of its fields."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    _pytree.register_dataclass(cls, field_names=names, drop_field_names=[])
    return cls


@as_pytree
@dataclass(frozen=True)
class LossTerm:
    """A loss as a sum and the number of things it is the sum of: means are taken over the whole window.

    Args:
        sum: scalar, carries the gradient.
        count: scalar, known from the data alone.
    """

    sum: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """The mean; 0 where there is nothing to average, and its gradient is 0 too."""
        return self.sum / self.count.clamp(min=1)


@as_pytree
@dataclass(frozen=True)
class Record:
    """What one mixture-of-experts layer saw in one forward of one micro-batch.

    Args:
        load_E: int64, assignments of valid tokens to each expert, before any drop.
        dropped: int64 scalar, how many of those were dropped.
        sums: for each balancer, in the layer's order, what its `observe` returned.
    """

    load_E: Tensor
    dropped: Tensor
    sums: list[dict[str, Tensor]] = field(default_factory=list)
