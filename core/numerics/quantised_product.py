"""Matrix products whose operands are rounded first, in all three places: forward, input gradient, weight gradient.

    Y = A(X) W(W)^T        dX = G(dY) W'(W)        dW = G'(dY)^T A'(X)

How each operand is rounded, and what is saved of the forward for the backward, is a `Rounding`; the product itself is
taken in fp32. Gradients are those of the product at the rounded operands: rounding is passed straight through.
"""

from abc import ABC, abstractmethod
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.numerics.grouped import grouped_outer, grouped_product
from core.numerics.linear import Formats, GroupedLinear, Linear

Kept = tuple[Tensor, ...]
"""What a rounding saves of an operand until the backward pass."""


class Rounding(ABC):
    """How the operands of one layer's products are rounded. Rows are 2-D; weights are [out, in] or [E, out, in].

    An operand may be anything that `product` and `outer` understand; here it is an fp32 tensor. `ends_E` is None for a
    plain layer; for a grouped one it says where each expert's rows end.
    """

    @abstractmethod
    def activation(self, x_AI: Tensor, ends_E: Tensor | None) -> tuple[Any, Kept]:
        """A(X), and what is saved of X."""

    @abstractmethod
    def activation_again(self, kept: Kept, ends_E: Tensor | None) -> Any:
        """A'(X), the operand of the weight gradient."""

    @abstractmethod
    def weight(self, weight: Tensor) -> tuple[Any, Kept]:
        """W(W), and what is saved of it: rounded once for a forward and its backward."""

    @abstractmethod
    def weight_again(self, kept: Kept) -> Any:
        """W'(W), the operand of the input gradient."""

    @abstractmethod
    def gradient(self, dy_AO: Tensor, ends_E: Tensor | None) -> Any:
        """G(dY), the operand of the input gradient."""

    @abstractmethod
    def gradient_again(self, dy_AO: Tensor, ends_E: Tensor | None) -> Any:
        """G'(dY), the operand of the weight gradient."""

    def seen(self, which: str, value: Tensor, ends_E: Tensor | None) -> None:  # noqa: B027 - most look at nothing
        """An operand before it is rounded: `activation`, `weight` or `gradient` of a step in training."""

    def product(self, rows: Any, weight: Any, ends_E: Tensor | None) -> Tensor:
        """rows @ weight^T, [A, out]."""
        result: Tensor = rows @ weight.t() if ends_E is None else grouped_product(rows, weight, ends_E)
        return result

    def product_back(self, rows: Any, weight: Any, ends_E: Tensor | None) -> Tensor:
        """rows @ weight, [A, in]."""
        result: Tensor = rows @ weight if ends_E is None else grouped_product(rows, weight.transpose(1, 2), ends_E)
        return result

    def outer(self, dy: Any, x: Any, ends_E: Tensor | None) -> Tensor:
        """dy^T x, for each expert: [out, in] or [E, out, in]."""
        result: Tensor = dy.t() @ x if ends_E is None else grouped_outer(dy, x, ends_E)
        return result


class RoundedProduct(torch.autograd.Function):
    """The three products of a layer."""

    @staticmethod
    def forward(
        ctx: Any, x_AI: Tensor, weight: Tensor, ends_E: Tensor | None, rounding: Rounding, training: bool
    ) -> Tensor:
        """Y in fp32."""
        rows, kept_x = rounding.activation(x_AI, ends_E)
        matrix, kept_w = rounding.weight(weight)
        if training:
            rounding.seen("activation", x_AI, ends_E)
            rounding.seen("weight", weight, None)
        ctx.rounding, ctx.split, ctx.training = rounding, len(kept_x), training
        ctx.dtype_x, ctx.dtype_w = x_AI.dtype, weight.dtype
        needs_x, needs_w = ctx.needs_input_grad[:2]
        kept = [t if needed else None for part, needed in ((kept_x, needs_w), (kept_w, needs_x)) for t in part]
        ctx.save_for_backward(ends_E, *kept)
        return rounding.product(rows, matrix, ends_E)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_AO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        """dX and dW, each only where it is asked for."""
        ends_E, *kept = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        dx = dw = None
        with torch.autocast(dy_AO.device.type, enabled=False):
            if ctx.training:
                rounding.seen("gradient", dy_AO, ends_E)
            if ctx.needs_input_grad[0]:
                matrix = rounding.weight_again(tuple(kept[ctx.split :]))
                dx = rounding.product_back(rounding.gradient(dy_AO, ends_E), matrix, ends_E).to(ctx.dtype_x)
            if ctx.needs_input_grad[1]:
                rows = rounding.activation_again(tuple(kept[: ctx.split]), ends_E)
                dw = rounding.outer(rounding.gradient_again(dy_AO, ends_E), rows, ends_E).to(ctx.dtype_w)
        return dx, dw, None, None, None


class RoundedLinear(Linear):
    """x W^T without bias, as its rounding says; the result is in the format of x.

    Args:
        rounding: of this layer alone, where it keeps something.
        path: what is noted as the code that ran.
        formats: see `core.numerics.linear.Formats`.
    """

    def __init__(self, inputs: int, outputs: int, rounding: Rounding, path: str, **formats: Unpack[Formats]) -> None:
        super().__init__(inputs, outputs, **formats)
        self.rounding, self.path = rounding, path

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        self.note(self.path)
        y_TO: Tensor = _product(x.reshape(-1, self.inputs), self.weight, None, self.rounding, self.training)
        return y_TO.view(*x.shape[:-1], self.outputs).to(x.dtype)


class RoundedGroupedLinear(GroupedLinear):
    """One x W^T for each group of rows; see `RoundedLinear`."""

    def __init__(
        self, groups: int, inputs: int, outputs: int, rounding: Rounding, path: str, **formats: Unpack[Formats]
    ) -> None:
        super().__init__(groups, inputs, outputs, **formats)
        self.rounding, self.path = rounding, path

    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by group, and where each group ends."""
        self.note(self.path)
        return _product(x_AI, self.weight, ends_E, self.rounding, self.training).to(x_AI.dtype)


def _product(x_AI: Tensor, weight: Tensor, ends_E: Tensor | None, rounding: Rounding, training: bool) -> Tensor:
    """The product outside of any autocast, which would take it in another format."""
    with torch.autocast(x_AI.device.type, enabled=False):
        result: Tensor = RoundedProduct.apply(x_AI, weight, ends_E, rounding, training and torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return result
