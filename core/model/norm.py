"""RMSNorm (report, section 4.2: eps 1e-6 in the released model)."""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.build import BuildContext
from core.model import few_tokens
from core.numerics.promotion import at_least_fp32

FEW = 64
"""Rows up to which a norm in decoding is computed by the fewest operations."""


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
        few = x.device.type == "cpu" and x.numel() <= FEW * self.dim
        if few and torch.is_inference_mode_enabled() and not torch.compiler.is_compiling():
            return self._of_few(x)
        kernels = few_tokens.kernels(x, x.numel() // self.dim, self.dim)
        if kernels is not None:
            normed: Tensor = kernels.rms_norm(x.reshape(-1, self.dim), self.weight, self.eps)
            return normed.view_as(x)
        wide = at_least_fp32(x)
        return F.rms_norm(wide, (self.dim,), self.weight.to(wide.dtype), self.eps).to(x.dtype)

    def _of_few(self, x: Tensor) -> Tensor:
        """The same for few rows in decoding on a CPU, where torch's operator spends its time between operations."""
        wide = at_least_fp32(x)
        if wide.numel() == self.dim:
            row_1D = wide.view(1, self.dim)
            eps = _constant(self.eps, wide.dtype)
            scale = torch.addmm(eps, row_1D, row_1D.t(), alpha=1 / self.dim).rsqrt_()
        else:
            squares = torch.linalg.vector_norm(wide, 2, -1, True).square_()
            scale = squares.mul_(1 / self.dim).add_(self.eps).rsqrt_()
        normed: Tensor = wide * scale * self.weight
        return normed.to(x.dtype)


@lru_cache(maxsize=16)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor on the CPU."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")
