"""FP8 products by torch alone: on Hopper in the report's tiles, on CPUs with the scales that torch supports there."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.component import Environment
from core.contracts.precision import plain_path
from core.contracts.schema import setting
from core.numerics.fp8 import FP8Precision, FP8Settings
from core.numerics.grouped import grouped_product
from core.numerics.number_formats import E4M3
from core.numerics.quantise import dequantise, quantise
from core.numerics.quantised_product import RoundedGroupedLinear, RoundedLinear
from plugins.fp8_native.fused import FusedRounding
from plugins.fp8_native.operand import Operand, multiply
from plugins.fp8_native.rounding import TILES, NativeRounding

INSTEAD = "precision fp8_emulated has them on any machine"


class NativeLinear(RoundedLinear):
    """A `RoundedLinear` whose product is plain where `scaled_mm` lacks its scales, as for a sample on a CPU."""

    rounding: NativeRounding

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (..., inputs) -> (..., outputs)."""
        if takes(self.rounding, x):
            self.path = self.rounding.path(x)
            return super().forward(x)
        self.note(plain_path(x.dtype))
        return F.linear(x, self.weight.to(x.dtype))


class NativeGroupedLinear(RoundedGroupedLinear):
    """A `RoundedGroupedLinear` whose products are plain where `scaled_mm` lacks its scales."""

    rounding: NativeRounding

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_AI: Tensor, ends_E: Tensor) -> Tensor:
        """The products [A, outputs] of rows sorted by group; `ends_E` says where each group ends."""
        if takes(self.rounding, x_AI):
            self.path = self.rounding.path(x_AI)
            return super().forward(x_AI, ends_E)
        self.note(plain_path(x_AI.dtype))
        return grouped_product(x_AI, self.weight.to(x_AI.dtype), ends_E)


def takes(rounding: Any, x: Tensor) -> bool:
    """Whether a product of x goes to `scaled_mm`."""
    return x.is_cuda or rounding.tiles != TILES["tile"]


class NativeFP8(FP8Precision):
    """Takes low roles' products by `torch.nn.functional.scaled_mm`, in E4M3 throughout."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3"
    example = {"name": "fp8_native", "scaling": "row", "stream": "fp32"}
    traceable = False

    @dataclass(kw_only=True)
    class Config(FP8Settings):
        """Settings of fp8_native."""

        stream: Literal["fp32", "bf16"] = setting(
            "bf16",
            doc="format of the residual stream, of what products return, and of products that stay high",
        )
        scaling: Literal["tile", "row", "tensor"] = setting(
            "tile",
            doc="elements that share a scale: 1x128 and 128x128 tiles (Hopper); a row of each operand; a tensor",
        )
        scales: Literal["fp32", "ue8m0"] = setting(
            "fp32", doc="format of scales; ue8m0: powers of two"
        )
        weight_gradient: Literal["paper", "te"] = setting(
            "paper",
            doc="activation of the weight gradient: the saved FP8 codes (paper), or the original (te)",
        )

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """The reason, as a sentence, why the device cannot multiply with these scales; it tries a small product."""
        cuda = environment.device == "cuda"
        hopper = environment.capability is not None and environment.capability[0] == 9
        if config.scaling == "tile" and not cuda:
            return (
                "torch's scaled_mm has 1x128 and 128x128 scales on Hopper GPUs, and none on CPUs; "
                f"scaling row and tensor run here, and {INSTEAD}"
            )
        if config.scaling != "tensor" and cuda and not hopper:
            own = ".".join(map(str, environment.capability or ()))
            return (
                f"torch's scaled_mm has what scaling {config.scaling} needs on compute capability 9.0 alone (Hopper), "
                f"and this GPU has {own}; {INSTEAD}"
            )
        return missing(config.scaling, environment.device)

    def low_linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A `NativeLinear`."""
        rounding = self._rounding(inputs)
        path = self.low_path(role)
        return NativeLinear(inputs, outputs, rounding, path, std=std, **self.formats(role))

    def low_grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        """A `NativeGroupedLinear`, one product after the other."""
        rounding = self._rounding(inputs)
        path = self.low_path(role)
        return NativeGroupedLinear(
            groups, inputs, outputs, rounding, path, std=std, **self.formats(role)
        )

    def low_path(self, role: str) -> str:
        """The code of a low role's products as far as it is known without a device; see `FusedRounding.path`."""
        return self._rounding(0).path(None)

    def _rounding(self, inputs: int) -> NativeRounding:
        config = self.config
        paper = config.weight_gradient == "paper"
        ue8m0 = config.scales == "ue8m0"
        kind: type[NativeRounding] = NativeRounding
        if config.scaling == "tile":
            kind = FusedRounding
        tiles = TILES[config.scaling]
        return kind(inputs, tiles, self.stream, power_of_two=ue8m0, codes_again=paper)


def missing(scaling: str, device: str) -> str | None:
    """The sentence that a device lacks products in these scales; None where small ones have the right results.

    Every tile of these operands has a scale of its own, so scales in another order would show.
    """
    tiles = TILES[scaling]
    m, n, k = (_column(size, device) for size in (48, 272, 640))
    a = (1 + m) * 2 ** (k.t() // 128)
    b = (1 + n // 128) * 3 ** (k.t() // 128)
    right_tiles = (tiles.weight, tiles.rows)  # of the weight, and of the weight gradient's operand
    try:
        for tile in dict.fromkeys(right_tiles):
            left = quantise(a, tiles.rows, E4M3)
            right = quantise(b, tile, E4M3)
            exact = dequantise(left).double() @ dequantise(right).double().t()
            found = multiply(Operand.of(left), Operand.of(right), torch.float32)
            error = (found - exact).abs() / exact
            if not bool((error < 1e-2).all()):
                return _lacks(scaling, "its results are wrong")
    except (RuntimeError, ValueError, AttributeError) as cause:
        return _lacks(scaling, str(cause).strip().partition("\n")[0])
    return None


def _column(size: int, device: str) -> Tensor:
    """0, 1, ... below a size as a column of fp32 numbers."""
    return torch.arange(size, device=device, dtype=torch.float32)[:, None]


def _lacks(scaling: str, why: str) -> str:
    return (
        f"torch {torch.__version__} has no scaled_mm for scaling {scaling} here ({why}); {INSTEAD}"
    )
