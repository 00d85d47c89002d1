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
        self._plain_path = plain_path(self.compute_dtype)
        self.weight = nn.Parameter(torch.empty(shape, dtype=formats["param_dtype"]))
        self._operand: Tensor | None = None
        self._operand_of: tuple[int, int] | None = None
        self.reset_parameters()

    def operand(self) -> Tensor:
        """The weight in the product's format: a cast, or the copy of `keep_operand` while the weight stays the same.

        The copy has no gradient, so it is for decoding only.
        """
        if self._operand is not None and not torch.is_grad_enabled():
            if self._operand_of == self._weight_now():
                return self._operand
            self.drop_operand()
        return self.weight.to(self.compute_dtype)

    def keep_operand(self) -> None:
        """Keeps the cast weight, so that decoding does not cast it for every token; nothing where no cast is needed."""
        current = self._operand is not None and self._operand_of == self._weight_now()
        if self.weight.dtype != self.compute_dtype and not current:
            with torch.inference_mode(False):
                self._operand = self.weight.detach().to(self.compute_dtype)
            self._operand_of = self._weight_now()

    def drop_operand(self) -> None:
        """Frees the copy of `keep_operand`."""
        self._operand = None
        self._operand_of = None

    def _weight_now(self) -> tuple[int, int]:
        """What changes when the weight is replaced, moved or written to in place."""
        return self.weight.data_ptr(), self.weight._version

    def matrix(self) -> Tensor | None:
        """The weight in the product's format, for callers that multiply by it in another order.

        None where `forward` is not the plain product with this matrix, in FP8 for example: it must then be called.
        """
        if not self.is_plain:
            return None
        self.note(self._plain_path)
        return self.operand()

    @property
    def is_plain(self) -> bool:
        """Whether `forward` is the one of this module, and not a derived layer's, and is all that a call does."""
        hooked = bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)
        return type(self).forward in (Linear.forward, GroupedLinear.forward) and not hooked

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


def plain_matrix(layer: object) -> Tensor | None:
    """The matrix W of a layer that computes x W^T, in the product's format, for callers that fuse the product.

    None for any other callable, for a layer with hooks, and for a weight that is divided over ranks at the moment.
    """
    matrix = layer.matrix() if isinstance(layer, Linear | SharedLinear) else None
    return None if isinstance(matrix, DTensor) else matrix


class Linear(ProductLayer):
    """x W^T without bias; `weight` is [outputs, inputs]. The keyword arguments are `LinearOptions`."""

    def __init__(self, inputs: int, outputs: int, **formats: Unpack[LinearOptions]) -> None:
        super().__init__(outputs, inputs, **formats)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (..., inputs) -> (..., outputs)."""
        self.note(self._plain_path)
        return F.linear(x.to(self.compute_dtype), self.operand())


class SharedLinear(nn.Module):
    """x W^T with the weight of another module, which alone owns it.

    Args:
        owner: has the parameter `weight`, [outputs, inputs].
        compute_dtype: format of the product's operands.
    """

    def __init__(self, owner: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self._owner = [owner]  # in a list, so that it is no submodule
        self.compute_dtype = compute_dtype

    @property
    def weight(self) -> Tensor:
        """The owner's weight."""
        weight: Tensor = self._owner[0].weight  # type: ignore[assignment]
        return weight

    def matrix(self) -> Tensor | None:
        """The weight in the product's format; None if a hook or a derived class does more than the product."""
        hooked = bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)
        if hooked or type(self).forward is not SharedLinear.forward:
            return None
        return self.weight.to(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (..., inputs) -> (..., outputs)."""
        return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype))


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
        self.note(self._plain_path)
        weight_EOI = self.operand()
        return grouped_product(x_AI.to(self.compute_dtype), weight_EOI, ends_E)
