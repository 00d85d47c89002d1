"""SwiGLU (arXiv 2002.05202): silu(gate) * up, for dense layers and experts alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from core.numerics import compiling
from core.numerics.linear import plain_matrix


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: ... x 2I -> ... x I; the first half of the last axis is the gate."""
    if torch.is_grad_enabled() and compiling.is_eager_on_cpu(gate_up):
        result: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_product(gate_up: Tensor, down: Callable[[Tensor], Tensor]) -> Tensor:
    """down(swiglu(gate_up)); in eager training on a CPU the activation is not kept but computed again.

    Args:
        gate_up: ... x 2I.
        down: a layer I -> D; one that does more than a plain product is called.
    """
    weight_DI = None
    if torch.is_grad_enabled() and compiling.is_eager_on_cpu(gate_up):
        weight_DI = plain_matrix(down)
    if weight_DI is None or weight_DI.dtype != gate_up.dtype or torch.is_autocast_enabled("cpu"):
        return down(swiglu(gate_up))
    result: Tensor = _SwiGLUProduct.apply(gate_up, weight_DI)  # type: ignore[no-untyped-call]
    return result


class _SwiGLU(torch.autograd.Function):
    """`swiglu` with half of the saved activations: silu(gate) is computed again, and both gradients fill one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, _ = gate_up.chunk(2, dim=-1)
        return swiglu_gradient(gate_up, F.silu(gate), dy)


class _SwiGLUProduct(torch.autograd.Function):
    """The activation and the product that follows; of the activation only its argument is saved."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_DI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight_DI)
        return F.linear(swiglu(gate_up), weight_DI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weight_DI = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        silu_gate = F.silu(gate)
        dweight_DI = None
        if ctx.needs_input_grad[1]:
            activation_TI = (silu_gate * up).reshape(-1, up.shape[-1])
            dweight_DI = dy.reshape(-1, dy.shape[-1]).t() @ activation_TI
        return swiglu_gradient(gate_up, silu_gate, dy @ weight_DI), dweight_DI


def swiglu_gradient(gate_up: Tensor, silu_gate: Tensor, dy: Tensor) -> Tensor:
    """The gradient of `swiglu` for its argument, without autograd.

    Args:
        gate_up: the argument, ... x 2I.
        silu_gate: silu of its first half, ... x I.
        dy: the gradient of the result, ... x I.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    torch.mul(silu_gate, dy, out=dup)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    return dgate_up
