"""FP8 products on NVIDIA GPUs by Transformer Engine; weights and optimizer state as in every other precision."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from core.contracts.component import Environment
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import setting
from core.numerics.fp8 import FP8Precision, FP8Settings
from plugins.te_fp8.engine import SCALINGS, present, unmet_requirement
from plugins.te_fp8.layers import ScalingRecipe, TEGroupedLinear, TELinear


class TransformerEngineFP8(FP8Precision):
    """Computes the products of low roles with `te.Linear` and `te.GroupedLinear` under one scaling recipe."""

    paper = "DeepSeek-V3 Technical Report (arXiv 2412.19437, section 3.3)"
    example = {"name": "te_fp8"}
    capabilities = frozenset({"gpu_only"})
    traceable = False

    @dataclass(kw_only=True)
    class Config(FP8Settings):
        """Settings of te_fp8."""

        stream: Literal["fp32", "bf16"] = setting(
            "bf16",
            doc="format of the residual stream, of what products return, and of products that stay high",
        )
        scaling: Literal["block", "current", "delayed", "mxfp8"] = setting(
            "block",
            doc="block: 1x128 and 128x128 (Hopper); current or delayed: one scale a tensor; mxfp8: 1x32 (Blackwell)",
        )
        gradients: Literal["e4m3", "e5m2"] = setting(
            "e4m3", doc="format of the gradients of outputs"
        )
        scales: Literal["ue8m0", "fp32"] = setting("ue8m0", doc="format of scales of scaling block")
        history: int = setting(1024, doc="largest values that scaling delayed remembers")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for settings that exclude each other."""
            super().check(parent)
            if self.history < 1:
                raise ConfigError("history", "must be at least 1")
            if self.scales == "fp32" and self.scaling != "block":
                why = f"scaling {self.scaling} has scales of its own"
                raise ConfigError("scales", f"must be ue8m0 unless scaling is block: {why}")

    @classmethod
    def capabilities_of(cls, config: Any) -> frozenset[str]:
        """Adds `remembers_products` under delayed scaling, where a repeated product has other scales and other bits."""
        if config.scaling == "delayed":
            return cls.capabilities | {"remembers_products"}
        return cls.capabilities

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """The GPU, CUDA or Transformer Engine that this scaling lacks, as a sentence; None if nothing is missing."""
        return unmet_requirement(config.scaling, environment)

    @cached_property
    def recipe(self) -> ScalingRecipe:
        """The scaling of every low role."""
        config = self.config
        return ScalingRecipe(
            config.scaling, gradients=config.gradients, scales=config.scales, history=config.history
        )

    def low_linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A `TELinear`; raises `UserError` for widths that it cannot take."""
        self._check_widths(inputs, outputs, role)
        return TELinear(
            inputs, outputs, std=std, recipe=self.recipe, stream=self.stream, **self.formats(role)
        )

    def low_grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        """A `TEGroupedLinear`; raises `UserError` for widths that it cannot take."""
        self._check_widths(inputs, outputs, role)
        made = {"recipe": self.recipe, "stream": self.stream, **self.formats(role)}
        return TEGroupedLinear(groups, inputs, outputs, std=std, **made)

    def low_path(self, role: str) -> str:
        """The code of a low role's products: Transformer Engine, and its recipe."""
        return self.recipe.path

    def gradient_dtype(self, role: str) -> torch.dtype:
        """The format of output gradients: that of `gradients` where the role is low."""
        if self.is_low(role) and self.config.gradients == "e5m2":
            return torch.float8_e5m2
        return super().gradient_dtype(role)

    def context(self) -> AbstractContextManager[Any]:
        """The autocast around a block, for delayed scaling only: its history would otherwise roll at every product.

        Each layer enters `te.autocast` by itself, so that a product is FP8 in a recomputed block and outside of blocks
        too.
        """
        if self.config.scaling == "delayed" and torch.cuda.is_available() and present():
            return self.recipe.context()
        return nullcontext()

    def _check_widths(self, inputs: int, outputs: int, role: str) -> None:
        tile = SCALINGS[self.config.scaling].tile
        for what, width in (("inputs", inputs), ("outputs", outputs)):
            if width % tile:
                raise UserError(
                    f"precision te_fp8: {role} has {width} {what}, and Transformer Engine takes multiples of {tile} "
                    f"under scaling {self.config.scaling}: change the width, or name {role} in precision.high"
                )
