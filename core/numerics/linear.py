"""The matrix-product layers that precisions hand out: a weight in high precision, a product in one format.

A precision with another product derives its layers from these and writes `forward` anew: names, layout and initial
weights then stay the same in every precision.
"""

from typing import NotRequired, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from core.contracts.precision import KernelLog, plain_path
from core.numerics.compiling import assume_constant_result
from core.numerics.draw import draw_normal, draw_stack
from core.numerics.grouped import grouped_product
from core.numerics.part_exchange import PartExchange


class LinearOptions(TypedDict):
    """The keyword arguments of every product layer.

    Args:
        std: standard deviation of the initial weights.
        param_dtype: format in which the weight is kept.
        compute_dtype: format of the product's operands.
        role: what the layer is for.
        kernels_used: the log in which the layer notes which code ran; by default there is none.
    """

    std: float
    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    role: NotRequired[str]
    kernels_used: NotRequired[KernelLog | None]


class ProductLayer(nn.Module):
    """The base of both kinds of layers: one parameter `weight`, and a note of which code ran.

    Args:
        shape: shape of `weight`, ending in [outputs, inputs].
        formats: see `LinearOptions`.
    """

    def __init__(self, *shape: int, **formats: Unpack[LinearOptions]) -> None:
        super().__init__()
        self.outputs, self.inputs = shape[-2:]
        self.std = formats["std"]
        self.compute_dtype = formats["compute_dtype"]
        self.role = formats.get("role", "")
        self.kernels_used = formats.get("kernels_used")
        self.weight = nn.Parameter(torch.empty(shape, dtype=formats["param_dtype"]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight from N(0, std)."""
        draw_normal(self.weight, self.std)

    @assume_constant_result
    def note(self, path: str) -> None:
        """Notes which code takes this product; a compiled forward notes it once, while it is traced."""
        if self.kernels_used is not None:
            self.kernels_used.note(self.role, path)

    def extra_repr(self) -> str:
        sizes = (*self.weight.shape[:-2], self.inputs, self.outputs)
        return f"{', '.join(map(str, sizes))}, {self.compute_dtype}"


class PlainProduct(nn.Module):
    """A layer that computes x W^T without bias, and nothing else unless a derived class has a `forward` of its own."""

    def operand(self) -> Tensor:
        """The weight W in the format of the product, [outputs, inputs]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (..., inputs) -> (..., outputs)."""
        weight = self.operand()
        return F.linear(x.to(weight.dtype), weight)


def plain_operand(layer: object) -> Tensor | None:
    """The operand of a layer whose output is x W^T, for callers that fuse the product; None for any other layer.

    A layer with hooks is another one, and so is one whose weight is divided over ranks at the moment.
    """
    if not isinstance(layer, PlainProduct) or type(layer).forward is not PlainProduct.forward:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return None
    weight = layer.operand()
    return None if isinstance(weight, DTensor) else weight


class Linear(PlainProduct, ProductLayer):
    """x W^T without bias; `weight` is [outputs, inputs]. The keyword arguments are `LinearOptions`."""

    def __init__(self, inputs: int, outputs: int, **formats: Unpack[LinearOptions]) -> None:
        super().__init__(outputs, inputs, **formats)

    def operand(self) -> Tensor:
        """The weight in the format of the product; it is noted that plain code takes this product."""
        self.note(plain_path(self.compute_dtype))
        return self.weight.to(self.compute_dtype)


class GroupedLinear(ProductLayer):
    """One x W^T for each group of rows; `weight` is [groups, outputs, inputs].

    Every group's initial weights have an address of their own, so adding experts leaves the others as they were.
    The keyword arguments are `LinearOptions`.

    Attributes:
        groups: how many groups this layer has.
        all_groups: how many there are over all ranks; more than `groups` if a strategy has divided them.
        first_group: the number of this layer's first group among all.
    """

    first_group: int = 0

    def __init__(
        self, groups: int, inputs: int, outputs: int, **formats: Unpack[LinearOptions]
    ) -> None:
        super().__init__(groups, outputs, inputs, **formats)
        self.groups = groups
        self.all_groups = groups

    def reset_parameters(self) -> None:
        """Draws the weight from N(0, std), each group from a generator seeded by the current seed and its index."""
        draw_stack(self.weight, self.std, first=self.first_group)

    def reset_shards(self, exchange: PartExchange) -> None:
        """Draws this rank's share of the matrices of a sharded weight; every rank of the exchange calls this."""
        draw_stack(self.weight, self.std, first=self.first_group, exchange=exchange)

    def keep_groups(self, first: int, groups: int) -> None:
        """Keeps `groups` groups from number `first` on; for a layer on the meta device, whose weights follow."""
        assert self.weight.is_meta
        self.first_group = first
        self.groups = groups
        self.weight = nn.Parameter(self.weight.detach()[first : first + groups])

    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """The products [A, outputs] of rows sorted by group; `ends_E` says where each group ends."""
        self.note(plain_path(self.compute_dtype))
        weight_EOI = self.weight.to(self.compute_dtype)
        return grouped_product(x_AI.to(self.compute_dtype), weight_EOI, ends_E)
