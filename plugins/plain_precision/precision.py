"""fp32, fp64, bf16 and its emulation: one weight format, one product format, and the roles that stay high."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.contracts.precision import Precision
from core.numerics.linear import GroupedLinear, Linear
from core.numerics.quantised_product import Kept, RoundedGroupedLinear, RoundedLinear, Rounding


class _Plain(Precision):
    """A precision with weights in `kept` and products in `computed`; the router's product is in `kept` too."""

    kept: ClassVar[torch.dtype]
    computed: ClassVar[torch.dtype]

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A `Linear` in this precision's formats."""
        return Linear(inputs, outputs, std=std, **self._formats(role))

    def grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        """A `GroupedLinear` in this precision's formats."""
        return GroupedLinear(groups, inputs, outputs, std=std, **self._formats(role))

    def _formats(self, role: str) -> dict[str, Any]:
        formats = {"param_dtype": self.param_dtype(role), "compute_dtype": self.compute_dtype(role)}
        return {**formats, "role": role, "kernels_used": self.kernels_used}

    def param_dtype(self, role: str) -> torch.dtype:
        """The format of weights, the same for every role."""
        return self.kept

    def compute_dtype(self, role: str) -> torch.dtype:
        """The format of products; router and norms stay in high precision (report, section 3.3)."""
        return self.kept if role in ("router", "norm") else self.computed


class FP32(_Plain):
    """fp32 for everything: the default on CPUs."""

    kept = computed = torch.float32
    example = {"name": "fp32"}


class FP64(_Plain):
    """fp64 for everything: for references, to 1e-10."""

    kept = computed = torch.float64
    example = {"name": "fp64"}


class BF16(_Plain):
    """Mixed precision: fp32 master weights, bf16 products and residual stream; router, norms and losses in fp32."""

    kept = torch.float32
    computed = torch.bfloat16
    example = {"name": "bf16"}


class BF16Rounding(Rounding):
    """Every operand rounded to bf16 and held in fp32; activations and weights are saved in bf16."""

    def activation(self, x_AI: Tensor, ends_E: Tensor | None) -> tuple[Tensor, Kept]:
        """X in bf16, held in fp32."""
        return _in_bf16(x_AI)

    def activation_again(self, kept: Kept, ends_E: Tensor | None) -> Tensor:
        """The same X again."""
        return kept[0].to(torch.float32)

    def weight(self, weight: Tensor) -> tuple[Tensor, Kept]:
        """W in bf16, held in fp32."""
        return _in_bf16(weight)

    def weight_again(self, kept: Kept) -> Tensor:
        """The same W again."""
        return kept[0].to(torch.float32)

    def gradient(self, dy_AO: Tensor, ends_E: Tensor | None) -> Tensor:
        """dY in bf16, held in fp32."""
        return _in_bf16(dy_AO)[0]

    def gradient_again(self, dy_AO: Tensor, ends_E: Tensor | None) -> Tensor:
        """The same dY again."""
        return _in_bf16(dy_AO)[0]


def _in_bf16(x: Tensor) -> tuple[Tensor, Kept]:
    """x rounded to bf16 and held in fp32, and the bf16 tensor that is saved."""
    short = x.to(torch.bfloat16)
    return short.to(torch.float32), (short,)


class BF16Emulated(_Plain):
    """bf16 operands and fp32 sums, by rounding and fp32 products: GPUs' `bf16` on CPUs, whose bf16 products are slow.

    Results and the residual stream stay in fp32.
    """

    kept = torch.float32
    computed = torch.bfloat16
    example = {"name": "bf16_emulated"}

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A layer with rounded operands, but for the router."""
        if self._is_high(role):
            return super().linear(inputs, outputs, role, std=std)
        rounding = BF16Rounding()
        path = self.path(role)
        return RoundedLinear(inputs, outputs, rounding, path, std=std, **self._formats(role))

    def grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        """A layer with a product of rounded operands for each group, but for the router."""
        if self._is_high(role):
            return super().grouped_linear(groups, inputs, outputs, role, std=std)
        rounding = BF16Rounding()
        path = self.path(role)
        return RoundedGroupedLinear(
            groups, inputs, outputs, rounding, path, std=std, **self._formats(role)
        )

    def compute_dtype(self, role: str) -> torch.dtype:
        """The format of operands; the embedding's is that of the residual stream, fp32."""
        return self.kept if self._is_high(role) else self.computed

    def path(self, role: str) -> str:
        """The code that takes a role's products: rounding and fp32 products, or plain ones."""
        if self._is_high(role):
            return super().path(role)
        return "emulated bfloat16"

    @staticmethod
    def _is_high(role: str) -> bool:
        return role in ("router", "norm", "embedding")
