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
from core.numerics.linear import GroupedLinear, Linear, LinearOptions

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

    def observe(self, which: str, value: Tensor, ends_E: Tensor | None) -> None:  # noqa: B027 - most keep nothing
        """Observes an operand before it is rounded: `activation`, `weight` or `gradient` of a training step."""

    def product(self, rows: Any, weight: Any, ends_E: Tensor | None) -> Tensor:
        """rows @ weight^T, [A, out]."""
        if ends_E is not None:
            return grouped_product(rows, weight, ends_E)
        result: Tensor = rows @ weight.t()
        return result

    def product_back(self, rows: Any, weight: Any, ends_E: Tensor | None) -> Tensor:
        """rows @ weight, [A, in]."""
        if ends_E is not None:
            return grouped_product(rows, weight.transpose(1, 2), ends_E)
        result: Tensor = rows @ weight
        return result

    def outer(self, dy: Any, x: Any, ends_E: Tensor | None) -> Tensor:
        """dy^T x, for each expert: [out, in] or [E, out, in]."""
        if ends_E is not None:
            return grouped_outer(dy, x, ends_E)
        result: Tensor = dy.t() @ x
        return result


class RoundedProduct(torch.autograd.Function):
    """Y, dX and dW of a layer, from rounded operands."""

    @staticmethod
    def forward(
        ctx: Any,
        x_AI: Tensor,
        weight: Tensor,
        ends_E: Tensor | None,
        rounding: Rounding,
        training: bool,
    ) -> Tensor:
        """Y in fp32."""
        rows, kept_x = rounding.activation(x_AI, ends_E)
        matrix, kept_w = rounding.weight(weight)
        if training:
            rounding.observe("activation", x_AI, ends_E)
            rounding.observe("weight", weight, None)
        ctx.rounding = rounding
        ctx.split = len(kept_x)
        ctx.training = training
        ctx.dtype_x = x_AI.dtype
        ctx.dtype_w = weight.dtype
        needs_x, needs_w = ctx.needs_input_grad[:2]
        saved_x = kept_x if needs_w else (None,) * len(kept_x)
        saved_w = kept_w if needs_x else (None,) * len(kept_w)
        ctx.save_for_backward(ends_E, *saved_x, *saved_w)
        return rounding.product(rows, matrix, ends_E)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_AO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        """dX and dW, each only where autograd needs it."""
        ends_E, *kept = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        dx = dw = None
        with torch.autocast(dy_AO.device.type, enabled=False):
            if ctx.training:
                rounding.observe("gradient", dy_AO, ends_E)
            if ctx.needs_input_grad[0]:
                kept_w = tuple(kept[ctx.split :])
                dx = _input_gradient(rounding, kept_w, dy_AO, ends_E).to(ctx.dtype_x)
            if ctx.needs_input_grad[1]:
                kept_x = tuple(kept[: ctx.split])
                dw = _weight_gradient(rounding, kept_x, dy_AO, ends_E).to(ctx.dtype_w)
        return dx, dw, None, None, None


def _input_gradient(
    rounding: Rounding, kept_w: Kept, dy_AO: Tensor, ends_E: Tensor | None
) -> Tensor:
    """dX = G(dY) W'(W)."""
    weight = rounding.weight_again(kept_w)
    gradient = rounding.gradient(dy_AO, ends_E)
    return rounding.product_back(gradient, weight, ends_E)


def _weight_gradient(
    rounding: Rounding, kept_x: Kept, dy_AO: Tensor, ends_E: Tensor | None
) -> Tensor:
    """dW = G'(dY)^T A'(X)."""
    rows = rounding.activation_again(kept_x, ends_E)
    gradient = rounding.gradient_again(dy_AO, ends_E)
    return rounding.outer(gradient, rows, ends_E)


class RoundedLinear(Linear):
    """x W^T without bias, from rounded operands; the result is in the format of x.

    Args:
        rounding: how operands are rounded; one that keeps something serves this layer alone.
        path: noted as the code that ran.
        formats: see `core.numerics.linear.LinearOptions`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rounding: Rounding,
        path: str,
        **formats: Unpack[LinearOptions],
    ) -> None:
        super().__init__(inputs, outputs, **formats)
        self.rounding = rounding
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (..., inputs) -> (..., outputs)."""
        self.note(self.path)
        x_TI = x.reshape(-1, self.inputs)
        y_TO = _product(x_TI, self.weight, None, self.rounding, self.training)
        return y_TO.view(*x.shape[:-1], self.outputs).to(x.dtype)


class RoundedGroupedLinear(GroupedLinear):
    """One x W^T for each group of rows; see `RoundedLinear`."""

    def __init__(
        self,
        groups: int,
        inputs: int,
        outputs: int,
        rounding: Rounding,
        path: str,
        **formats: Unpack[LinearOptions],
    ) -> None:
        super().__init__(groups, inputs, outputs, **formats)
        self.rounding = rounding
        self.path = path

    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """The products [A, outputs] of rows sorted by group; `ends_E` says where each group ends."""
        self.note(self.path)
        return _product(x_AI, self.weight, ends_E, self.rounding, self.training).to(x_AI.dtype)


def _product(
    x_AI: Tensor, weight: Tensor, ends_E: Tensor | None, rounding: Rounding, training: bool
) -> Tensor:
    """The product without autocast, which would change its format."""
    training = training and torch.is_grad_enabled()
    with torch.autocast(x_AI.device.type, enabled=False):
        result: Tensor = RoundedProduct.apply(x_AI, weight, ends_E, rounding, training)  # type: ignore[no-untyped-call]
        return result
