"""SwiGLU (arXiv 2002.05202): silu(gate) * up, for dense layers and experts alike.

With a limit (DeepSeek-V4, arXiv 2606.19348) both factors are clamped before they are used: the gate from above, up from
both sides. A clamped element gets no gradient; one that is exactly at the limit gets its own, as `torch.clamp` has it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from core.contracts.errors import ConfigError
from core.numerics import compiling
from core.numerics.linear import plain_matrix


def check_limit(limit: float | None) -> None:
    """Raises `ConfigError` unless a `swiglu_limit` is null or positive; a recipe holds finite numbers only."""
    if limit is not None and not limit > 0:
        raise ConfigError("swiglu_limit", "must be more than 0, or null: no limit")


def swiglu(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up: ... x 2I -> ... x I.

    Args:
        gate_up: the first half of the last axis is the gate.
        limit: the most that gate and |up| count for; None: no limit.
    """
    if torch.is_grad_enabled() and _has_own_backward(gate_up, limit):
        result: Tensor = _SwiGLU.apply(gate_up, limit)  # type: ignore[no-untyped-call]
        return result
    gate, up = gate_and_up(gate_up, limit)
    return F.silu(gate) * up


def _has_own_backward(gate_up: Tensor, limit: float | None) -> bool:
    """Whether `_SwiGLU` pays: on a CPU, and with a limit on GPUs too, where autograd would keep both clamped halves."""
    if limit is not None:
        return not torch.compiler.is_compiling()
    return compiling.is_eager_on_cpu(gate_up)


def gate_and_up(gate_up: Tensor, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """The two halves of the last axis, clamped if there is a limit: ... x I each."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is None:
        return gate, up
    return gate.clamp(max=limit), up.clamp(min=-limit, max=limit)


def swiglu_product(
    gate_up: Tensor, down: Callable[[Tensor], Tensor], limit: float | None = None
) -> Tensor:
    """down(swiglu(gate_up)); in eager training on a CPU the activation is not kept but computed again.

    Args:
        gate_up: ... x 2I.
        down: a layer I -> D; one that does more than a plain product is called.
        limit: that of `swiglu`.
    """
    weight_DI = None
    if torch.is_grad_enabled() and compiling.is_eager_on_cpu(gate_up):
        weight_DI = plain_matrix(down)
    if weight_DI is None or weight_DI.dtype != gate_up.dtype or torch.is_autocast_enabled("cpu"):
        return down(swiglu(gate_up, limit))
    result: Tensor = _SwiGLUProduct.apply(gate_up, weight_DI, limit)  # type: ignore[no-untyped-call]
    return result


class _SwiGLU(torch.autograd.Function):
    """`swiglu` with half of the saved activations: silu(gate) is computed again, and both gradients fill one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        gate, up = gate_and_up(gate_up, limit)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, _ = gate_and_up(gate_up, ctx.limit)
        return swiglu_gradient(gate_up, F.silu(gate), dy, ctx.limit), None


class _SwiGLUProduct(torch.autograd.Function):
    """The activation and the product that follows; of the activation only its argument is saved."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_DI: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_up, weight_DI)
        ctx.limit = limit
        return F.linear(swiglu(gate_up, limit), weight_DI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate_up, weight_DI = ctx.saved_tensors
        gate, up = gate_and_up(gate_up, ctx.limit)
        silu_gate = F.silu(gate)
        dweight_DI = None
        if ctx.needs_input_grad[1]:
            activation_TI = (silu_gate * up).reshape(-1, up.shape[-1])
            dweight_DI = dy.reshape(-1, dy.shape[-1]).t() @ activation_TI
        return swiglu_gradient(gate_up, silu_gate, dy @ weight_DI, ctx.limit), dweight_DI, None


def swiglu_gradient(
    gate_up: Tensor, silu_gate: Tensor, dy: Tensor, limit: float | None = None
) -> Tensor:
    """The gradient of `swiglu` for its argument, without autograd.

    Args:
        gate_up: the argument, ... x 2I, not clamped.
        silu_gate: silu of its first half, clamped if there is a limit: ... x I.
        dy: the gradient of the result, ... x I.
        limit: that of `swiglu`.
    """
    gate, up = gate_and_up(gate_up, limit)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    torch.mul(silu_gate, dy, out=dup)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    if limit is not None:
        gate, up = gate_up.chunk(2, dim=-1)
        dgate.masked_fill_(~(gate <= limit), 0)
        dup.masked_fill_(~(up.abs() <= limit), 0)
    return dgate_up
