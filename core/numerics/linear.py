"""The matrix-product layers that precisions hand out: a weight in high precision, a product in one format.

A precision with another product derives its layers from these and writes `forward` anew: names, layout and initial
weights then stay the same in every precision.
"""

from typing import NotRequired, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.precision import Paths, plain_path
from core.numerics.draw import draw_normal, draw_stack
from core.numerics.grouped import grouped_product


class Formats(TypedDict):
    """What every product layer is told by name.

    Args:
        std: of the initial weights.
        param_dtype: format in which the weight is kept.
        compute_dtype: format of the product's operands.
        role: what the layer is for.
        paths: where the layer notes which code ran; left out: nowhere.
    """

    std: float
    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    role: NotRequired[str]
    paths: NotRequired[Paths | None]


class Product(nn.Module):
    """What both kinds of layers share: one parameter `weight`, and a note of which code ran.

    Args:
        shape: of `weight`, ending in [outputs, inputs].
        formats: see `Formats`.
    """

    def __init__(self, *shape: int, **formats: Unpack[Formats]) -> None:
        super().__init__()
        self.outputs, self.inputs = shape[-2:]
        self.std, self.compute_dtype = formats["std"], formats["compute_dtype"]
        self.role, self.paths = formats.get("role", ""), formats.get("paths")
        self.weight = nn.Parameter(torch.empty(shape, dtype=formats["param_dtype"]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, std)."""
        draw_normal(self.weight, self.std)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def note(self, path: str) -> None:
        """This product goes `path`; a compiled forward says so once, while it is traced."""
        if self.paths is not None:
            self.paths.note(self.role, path)

    def extra_repr(self) -> str:
        sizes = (*self.weight.shape[:-2], self.inputs, self.outputs)
        return f"{', '.join(map(str, sizes))}, {self.compute_dtype}"


class Linear(Product):
    """x W^T without bias; `weight` is [outputs, inputs]. The arguments by name are `Formats`."""

    def __init__(self, inputs: int, outputs: int, **formats: Unpack[Formats]) -> None:
        super().__init__(outputs, inputs, **formats)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        self.note(plain_path(self.compute_dtype))
        return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype))


class GroupedLinear(Product):
    """One x W^T for each group of rows; `weight` is [groups, outputs, inputs].

    Every group's initial weights have an address of their own, so adding experts leaves the others as they were.
    The arguments by name are `Formats`.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, **formats: Unpack[Formats]) -> None:
        super().__init__(groups, outputs, inputs, **formats)
        self.groups = groups

    def reset_parameters(self) -> None:
        """N(0, std), each group from a generator seeded by the current seed and its index."""
        draw_stack(self.weight, self.std)

    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by group, and where each group ends."""
        self.note(plain_path(self.compute_dtype))
        return grouped_product(x_AI.to(self.compute_dtype), self.weight.to(self.compute_dtype), ends_E)
