"""What FP8 precisions share: fp32 masters under the usual names, a table of which roles are low, one stream format.

An FP8 precision derives from `FP8Precision` and says how its low layers are made. The high layers, the formats and what
`describe` prints are defined here, once.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from core.contracts.precision import Precision, RoleSettings
from core.contracts.schema import setting
from core.numerics.linear import GroupedLinear, Linear

STREAMS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class FP8Settings(RoleSettings):
    """The keys of every FP8 precision."""

    stream: Literal["fp32", "bf16"] = setting(
        "fp32",
        doc="format of the residual stream, of what products return, and of products that stay high",
    )


class FP8Precision(Precision):
    """Low roles are E4M3 products; the others are plain ones in the stream's format, the router's in fp32.

    Weights are fp32 masters (report, section 3.3.1). Low layers derive from `core.numerics.linear`'s, or have a
    `weight` of the same name and layout, and are made with `formats(role)`.
    """

    low_dtype: torch.dtype = torch.float8_e4m3fn
    """The format of activations and weights in low products."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stream = STREAMS[config.stream]

    @abstractmethod
    def low_linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A low layer, as `Precision.linear` says."""

    @abstractmethod
    def low_grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        """A low layer with a product for every group, as `Precision.grouped_linear` says."""

    @abstractmethod
    def low_path(self, role: str) -> str:
        """The code that takes the products of a low role, in words."""

    def is_low(self, role: str) -> bool:
        """Whether a role's products have FP8 operands."""
        return not self.config.stays_high(role)

    def formats(self, role: str) -> dict[str, Any]:
        """The keyword arguments of every layer of `core.numerics.linear`, but for `std`."""
        return {
            "param_dtype": self.param_dtype(role),
            "compute_dtype": self.compute_dtype(role),
            "role": role,
            "kernels_used": self.kernels_used,
        }

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A low layer, or a plain one where the role stays high."""
        if self.is_low(role):
            return self.low_linear(inputs, outputs, role, std=std)
        return Linear(inputs, outputs, std=std, **self.formats(role))

    def grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        """A low layer with a product for every group, or a plain one where the role stays high."""
        if self.is_low(role):
            return self.low_grouped_linear(groups, inputs, outputs, role, std=std)
        return GroupedLinear(groups, inputs, outputs, std=std, **self.formats(role))

    def param_dtype(self, role: str) -> torch.dtype:
        """fp32 for every role: weights are masters."""
        return torch.float32

    def compute_dtype(self, role: str) -> torch.dtype:
        """FP8 where the role is low; the stream's format elsewhere, but fp32 for router and norms."""
        if self.is_low(role):
            return self.low_dtype
        if role in ("router", "norm"):
            return torch.float32
        return self.stream

    def path(self, role: str) -> str:
        """The code that takes the role's products: the low layer's, or the plain one's."""
        if self.is_low(role):
            return self.low_path(role)
        return super().path(role)
