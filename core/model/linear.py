"""The matrix-product layers that the plain precisions hand out: high-precision weight, product in one format."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.model.grouped import grouped_product
from core.model.initialise import address, draw_normal


class Linear(nn.Module):
    """x W^T without bias.

    Args:
        inputs, outputs: widths; `weight` is [outputs, inputs].
        std: of the initial weights.
        param_dtype: format in which the weight is kept.
        compute_dtype: format of the product and its result.
    """

    def __init__(
        self, inputs: int, outputs: int, *, std: float, param_dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.std, self.compute_dtype = inputs, outputs, std, compute_dtype
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=param_dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, std)."""
        draw_normal(self.weight, self.std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype))

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, {self.compute_dtype}"


class GroupedLinear(nn.Module):
    """One x W^T for each group of rows; `weight` is [groups, outputs, inputs].

    Every group's initial weights have an address of their own, so adding experts leaves the others as they were.
    """

    def __init__(
        self,
        groups: int,
        inputs: int,
        outputs: int,
        *,
        std: float,
        param_dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.groups, self.inputs, self.outputs = groups, inputs, outputs
        self.std, self.compute_dtype = std, compute_dtype
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs, dtype=param_dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, std), each group from a generator seeded by the current seed and its index."""
        seed = torch.initial_seed()
        for index, weight in enumerate(self.weight.detach()):
            draw_normal(weight, self.std, seed=address(seed, str(index)))

    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by group, and where each group ends."""
        return grouped_product(x_AI.to(self.compute_dtype), self.weight.to(self.compute_dtype), ends_E)

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.inputs}, {self.outputs}, {self.compute_dtype}"
