"""fp32, fp64 and bf16: one weight format, one product format, and the roles that stay high."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from core.contracts.precision import Precision
from core.model.linear import GroupedLinear, Linear


class _Plain(Precision):
    """Weights in `kept`, products in `computed`; the router's product in `kept` too."""

    kept: ClassVar[torch.dtype]
    computed: ClassVar[torch.dtype]

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A `Linear` in this precision's formats."""
        return Linear(inputs, outputs, std=std, **self._formats(role))

    def grouped_linear(self, groups: int, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A `GroupedLinear` in this precision's formats."""
        return GroupedLinear(groups, inputs, outputs, std=std, **self._formats(role))

    def _formats(self, role: str) -> dict[str, Any]:
        formats = {"param_dtype": self.param_dtype(role), "compute_dtype": self.compute_dtype(role)}
        return {**formats, "role": role, "paths": self.paths}

    def param_dtype(self, role: str) -> torch.dtype:
        """The same for every role."""
        return self.kept

    def compute_dtype(self, role: str) -> torch.dtype:
        """High for the router and norms (report, section 3.3: gating and normalisation stay in high precision)."""
        return self.kept if role in ("router", "norm") else self.computed


class FP32(_Plain):
    """Everything in fp32: the default on CPUs."""

    kept = computed = torch.float32
    example = {"name": "fp32"}


class FP64(_Plain):
    """Everything in fp64: for references, to 1e-10."""

    kept = computed = torch.float64
    example = {"name": "fp64"}


class BF16(_Plain):
    """Mixed: fp32 master weights, bf16 products and residual stream; router, norms and losses in fp32."""

    kept, computed = torch.float32, torch.bfloat16
    example = {"name": "bf16"}
