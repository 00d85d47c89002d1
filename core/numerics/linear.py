"""The matrix-product layers that precisions hand out: a weight in high precision, a product in one format.

A precision with another product derives its layers from these and writes `forward` anew: names, layout and initial
weights then stay the same in every precision.
"""

from collections.abc import Sequence
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
        self.reads_copy = False
        self.reset_parameters()

    def operand(self) -> Tensor:
        """The weight in the product's format: a cast, or under `reads_copy` what `keep_operand` kept."""
        if self.reads_copy and self._operand is not None:
            return self._operand
        return self.weight.to(self.compute_dtype)

    @torch.no_grad()
    def keep_operand(self) -> None:
        """Keeps the cast weight for decoding, at the same address as before; nothing where no cast is needed.

        It is read under `reads_copy` alone: nobody can see whether a weight has changed since, because fused optimizers
        and writes through `data` leave its version as it was.
        """
        if self.weight.dtype == self.compute_dtype:
            return
        with torch.inference_mode(False):
            kept = self._operand
            if kept is None or kept.device != self.weight.device or kept.shape != self.weight.shape:
                self._operand = self.weight.detach().to(self.compute_dtype)
            else:
                kept.copy_(self.weight)

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
        return type(self).forward in (Linear.forward, GroupedLinear.forward) and not is_hooked(self)

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


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class's `forward`: hooks, or a `forward` of this object alone."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)


def plain_matrix(layer: object) -> Tensor | None:
    """The matrix W of a layer that computes x W^T, in the product's format, for callers that fuse the product.

    A `GroupedLinear` has one for each group, [groups, out, in].

    None for any other callable, for a layer with hooks, and for a weight that is divided over ranks at the moment.
    """
    matrix = layer.matrix() if isinstance(layer, Linear | GroupedLinear | SharedLinear) else None
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
        if is_hooked(self) or type(self).forward is not SharedLinear.forward:
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
        trained = self.weight.requires_grad
        own = self.weight.detach()[first : first + groups]
        self.weight = nn.Parameter(own, requires_grad=trained)

    @torch.no_grad()
    def take_groups(self, numbers: Sequence[int], *, first: int, all_groups: int) -> None:
        """Makes these groups the layer's, in this order; a group that is named twice gets two matrices.

        For inference only: matrices that were copied would be trained apart.

        Args:
            numbers: groups that the layer has now.
            first: the number of the first of them among all.
            all_groups: how many there are over all ranks.
        """
        index = torch.tensor(list(numbers), dtype=torch.int64, device=self.weight.device)
        self.weight = nn.Parameter(self.weight.index_select(0, index), requires_grad=False)
        self.groups = len(index)
        self.first_group = first
        self.all_groups = all_groups
        self._operand = None

    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """The products [A, outputs] of rows sorted by group; `ends_E` says where each group ends."""
        self.note(self._plain_path)
        weight_EOI = self.operand()
        return grouped_product(x_AI.to(self.compute_dtype), weight_EOI, ends_E)
