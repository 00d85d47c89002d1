"""The `fp8_emulated` precision: which roles are low, how their operands are scaled, what is saved."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from core.contracts.errors import ConfigError
from core.contracts.precision import declared_roles, roles_matching
from core.contracts.schema import setting
from core.numerics.fp8 import FP8Precision, FP8Settings
from core.numerics.number_formats import E4M3, E5M6, FORMATS, Format
from core.numerics.quantised_product import RoundedGroupedLinear, RoundedLinear
from plugins.fp8_emulated.accumulate import AT_ONCE, NarrowRounding
from plugins.fp8_emulated.delayed import DelayedAmax
from plugins.fp8_emulated.rounding import TILES, EmulatedRounding


class EmulatedFP8(FP8Precision):
    """FP8 operands in all three products of every low layer, rounded by fp32 arithmetic on any machine."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3"
    example: ClassVar[dict[str, Any]] = {"name": "fp8_emulated"}

    @dataclass(kw_only=True)
    class Config(FP8Settings):
        """Settings of emulated FP8; every default is the report's."""

        scaling: Literal["tile", "tensor", "delayed", "mxfp8"] = setting(
            "tile",
            doc="elements that share a scale: 1x128 and 128x128 tiles; a tensor, now or of earlier steps; 1x32",
        )
        scales: Literal["fp32", "ue8m0"] = setting(
            "fp32", doc="format of scales; ue8m0: powers of two, as mxfp8 needs"
        )
        gradients: Literal["e4m3", "e5m2"] = setting("e4m3", doc="format of output gradients")
        weight_gradient: Literal["paper", "te"] = setting(
            "paper",
            doc="activation of the weight gradient: the saved FP8 codes (paper), or the original (te)",
        )
        e5m6: list[str] = setting(
            ["attention.output"], doc="roles whose input is saved in E5M6; only for paper"
        )
        history: int = setting(16, doc="steps that delayed scaling remembers")
        accumulator_bits: int | None = setting(
            None, doc="significant bits that sums keep, slow: 14 is an H800; null: fp32"
        )
        promote_every: int | None = setting(
            128, doc="elements after which such a sum is added to an fp32 one; null: never"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for unknown roles, and for sums that no tensor core forms."""
            super().check(parent)
            try:
                roles_matching(self.e5m6, declared_roles(parent))
            except ConfigError as error:
                raise ConfigError(f"e5m6.{error.key}", error.why) from error
            if self.history < 1:
                raise ConfigError("history", "must be at least 1")
            every = self.promote_every
            if every is not None and (every < AT_ONCE or 128 % every):
                why = "whole instructions that divide a tile"
                raise ConfigError("promote_every", f"must be 32, 64 or 128, {why}")
            if self.accumulator_bits is not None:
                self._check_sums(self.accumulator_bits)

        def _check_sums(self, bits: int) -> None:
            if not 4 <= bits <= 18:
                why = "must be from 4 to 18: sums of 32 such numbers are exact in fp32"
                raise ConfigError("accumulator_bits", why)
            if self.scaling == "mxfp8":
                why = "must be null with mxfp8, whose scales are applied inside the sum"
                raise ConfigError("accumulator_bits", why)
            if self.promote_every is None and self.scaling == "tile":
                why = "must be a number with tile scaling: a tile's scale needs a sum of its own"
                raise ConfigError("promote_every", why)

    def low_linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A layer with rounded operands."""
        rounding = self._rounding(inputs, role, experts=0)
        path = self.low_path(role)
        layer = RoundedLinear(inputs, outputs, rounding, path, std=std, **self.formats(role))
        return _with_state(layer)

    def low_grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        """A layer with rounded operands for each group; tiles never cross groups."""
        rounding = self._rounding(inputs, role, experts=groups)
        path = self.low_path(role)
        layer = RoundedGroupedLinear(
            groups, inputs, outputs, rounding, path, std=std, **self.formats(role)
        )
        return _with_state(layer)

    def gradient_dtype(self, role: str) -> torch.dtype:
        """The format of output gradients: that of `gradients` where the role is low."""
        if not self.is_low(role):
            return super().gradient_dtype(role)
        dtype = FORMATS[self.config.gradients].dtype
        assert dtype is not None
        return dtype

    def low_path(self, role: str) -> str:
        """The rounding of a low role in words: formats, tiles of activations and gradients, and of weights.

        For example `emulated e4m3 1x128 / 128x128`.
        """
        config = self.config
        tiles = TILES[self.config.scaling]
        delayed = "delayed " if config.scaling == "delayed" else ""
        parts = [f"emulated e4m3 {delayed}{tiles.row} / {tiles.weight}"]
        if self._power_of_two:
            parts.append("ue8m0 scales")
        if config.gradients != "e4m3":
            parts.append(f"{config.gradients} gradients")
        saved = self._saved(role)
        if saved is None:
            parts.append("input saved as it is")
        elif saved is not E4M3:
            parts.append(f"saved in {saved.name}")
        if config.accumulator_bits is not None:
            every = f"every {config.promote_every}" if config.promote_every else "never promoted"
            parts.append(f"{config.accumulator_bits}-bit sums {every}")
        return ", ".join(parts)

    @property
    def _power_of_two(self) -> bool:
        found: bool = self.config.scales == "ue8m0" or self.config.scaling == "mxfp8"
        return found

    def _saved(self, role: str) -> Format | None:
        """The format in which a role's input is saved; None if it is saved as it is."""
        if self.config.weight_gradient == "te":
            return None
        if any(fnmatchcase(role, pattern) for pattern in self.config.e5m6):
            return E5M6
        return E4M3

    def _rounding(self, inputs: int, role: str, *, experts: int) -> EmulatedRounding:
        config = self.config
        amax = DelayedAmax(config.history, experts) if config.scaling == "delayed" else None
        settings: dict[str, Any] = {
            "inputs": inputs,
            "tiles": TILES[config.scaling],
            "gradients": FORMATS[config.gradients],
            "power_of_two": self._power_of_two,
            "saved": self._saved(role),
            "amax": amax,
        }
        if config.accumulator_bits is None:
            return EmulatedRounding(**settings)
        return NarrowRounding(**settings, bits=config.accumulator_bits, every=config.promote_every)


def _with_state(layer: RoundedLinear | RoundedGroupedLinear) -> nn.Module:
    """The layer, in which the state that its rounding keeps between steps is registered."""
    assert isinstance(layer.rounding, EmulatedRounding)
    if layer.rounding.amax is not None:
        layer.amax = layer.rounding.amax
    return layer
