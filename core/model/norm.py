"""RMSNorm (report, section 4.2: eps 1e-6 in the released model)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from core.contracts.build import BuildContext
from core.model import few_tokens
from core.numerics import compiling
from core.numerics.promotion import at_least_fp32


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 or wider and returned in the format of x.

    Args:
        dim: width of the last axis.
        build: the model around the norm: its epsilon, and the format in which weights are kept.
    """

    def __init__(self, dim: int, build: BuildContext) -> None:
        super().__init__()
        self.role = "norm"
        self.dim = dim
        self.eps = build.norm_eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=build.precision.param_dtype("norm")))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis of x, which has any shape that ends in `dim`."""
        kernels = few_tokens.kernels(x, x.numel() // self.dim, self.dim)
        if kernels is not None:
            normed: Tensor = kernels.rms_norm(x.reshape(-1, self.dim), self.weight, self.eps)
            return normed.view_as(x)
        wide = at_least_fp32(x)
        weight = self.weight.to(wide.dtype)
        if compiling.is_eager_on_cpu(wide):
            if torch.is_grad_enabled():
                normed = _RMSNorm.apply(wide, weight, self.eps)  # type: ignore[no-untyped-call]
                return normed.to(x.dtype)
            if wide.numel() == self.dim:
                return _normed_row(wide, weight, self.eps).to(x.dtype)
        return F.rms_norm(wide, (self.dim,), weight, self.eps).to(x.dtype)


def _normed_row(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of a single row, in half of the operator's time: it takes longer to start operations than to do them."""
    row_D = x.flatten()
    square = float(torch.dot(row_D, row_D))
    scale: float = (square / len(row_D) + eps) ** -0.5
    return (x * scale).mul_(weight_D)


class _RMSNorm(torch.autograd.Function):
    """`F.rms_norm` for CPUs, where torch has no kernel for it and takes about twenty passes over x instead of six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        normed: Tensor = (x * scale).mul_(weight_D)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        product_TD = (dy * x).reshape(-1, x.shape[-1])
        dweight_D = product_TD.t().mv(scale.flatten())
        # dx = scale * (weight dy) - x * scale^3 * mean(weight dy x)
        mean = product_TD.mv(weight_D).view_as(scale).div_(x.shape[-1])
        dx = (dy * weight_D).mul_(scale)
        dx.addcmul_(x, mean.mul_(scale).mul_(scale).mul_(scale), value=-1)
        return dx, dweight_D, None
