"""What a layer counted in a forward: returned with its output, and added up once, outside recomputation.

Data classes that cross a layer's boundary are registered as pytrees, so that FSDP's hooks, activation
checkpointing and `torch.compile` find the tensors in them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

T = TypeVar("T")


def as_pytree(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree of its fields and returns it."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    _pytree.register_dataclass(cls, field_names=names, drop_field_names=[])
    return cls


@as_pytree
@dataclass(frozen=True)
class MeanMetric:
    """A number that is reported as a mean: the sum and the count are added over micro-batches, ranks and layers.

    Args:
        sum: scalar, without a gradient.
        count: scalar, how many values the sum has.
    """

    sum: Tensor
    count: Tensor

    def merge(self, other: "MeanMetric") -> "MeanMetric":
        """Combines two: the mean over the values of both."""
        return MeanMetric(self.sum + other.sum, self.count + other.count)

    def value(self) -> Tensor:
        """The mean, fp64; 0 if nothing was counted."""
        return self.sum.double() / self.count.clamp(min=1)


@as_pytree
@dataclass(frozen=True)
class MaxMetric:
    """A number that is reported as the maximum over micro-batches, ranks and layers.

    Args:
        maximum: scalar, without a gradient.
    """

    maximum: Tensor

    def merge(self, other: "MaxMetric") -> "MaxMetric":
        """Combines two: the larger maximum."""
        return MaxMetric(torch.maximum(self.maximum, other.maximum))

    def value(self) -> Tensor:
        """The maximum, fp64."""
        return self.maximum.double()


Metric = MeanMetric | MaxMetric
"""A number to report, with the way in which it is reduced."""


@as_pytree
@dataclass(frozen=True)
class Record:
    """What an attention or a feed-forward layer counted in one forward of one micro-batch.

    Padding counts nowhere. Everything is a sum over the micro-batch or a maximum, so that records of micro-batches,
    ranks and recomputed forwards can be combined exactly.

    Args:
        load_E: int64, assignments of valid tokens to each expert, before any drop; None without experts.
        dropped: int64 scalar, how many of those were dropped; None without experts.
        sums: what the `observe` of each balancer returned, in the layer's order.
        balancer_tallies: int64 counts that the `tally` of each balancer returned, in the layer's order.
        terms: the layer's own losses as sums, by name; their denominators are the layer's `counts`.
        tallies: the layer's own int64 counts, by name; summed exactly over micro-batches and data ranks.
        metrics: the layer's own numbers to report, by name.

    Names, shapes of tallies and reductions of metrics are the same in every batch, one of nothing but padding included:
    data ranks add them up without exchanging names.
    """

    load_E: Tensor | None = None
    dropped: Tensor | None = None
    sums: list[dict[str, Tensor]] = field(default_factory=list)
    balancer_tallies: list[dict[str, Tensor]] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTotals:
    """What one component counted in an optimizer step, over all its micro-batches and data ranks.

    Args:
        load_E: int64 load of the component's layer; None where the layer has no experts.
        tallies: the component's own int64 counts, by name.
        metrics: the component's own metrics, by name.
    """

    load_E: Tensor | None = None
    tallies: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
