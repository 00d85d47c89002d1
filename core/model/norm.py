"""RMSNorm (report, section 4.2: eps 1e-6 in the released model)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.build import BuildContext
from core.model import few_tokens
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
        return F.rms_norm(wide, (self.dim,), self.weight.to(wide.dtype), self.eps).to(x.dtype)
