"""How the operands of an emulated FP8 layer are rounded (report, section 3.3.2 and figure 7).

    Y  = Q_row(X)      Q_block(W)^T
    dX = Q_row(dY)     Q_block(W)          the same quantised W
    dW = Q_column(dY)^T Q_column(X')       tiles along tokens, restarted at each expert's first row

X' is what was saved: the codes of Q_row(X) as the report saves them, E5M6 where attention's backward reads it too, or
X itself as Transformer Engine does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.numerics.quantise import (
    BLOCK,
    COLUMN,
    E4M3,
    E5M6,
    ROW,
    WHOLE,
    Format,
    Quantised,
    Tile,
    dequantise,
    rounded,
    rounded_and_kept,
    tile_amax,
)
from core.numerics.quantised_product import Kept, Rounding
from plugins.fp8_emulated.delayed import DelayedAmax


@dataclass(frozen=True)
class Tiles:
    """Which elements of an operand share a scale.

    Args:
        row: of activations and gradients, along the contraction of forward and input gradient.
        column: of both along tokens, for the weight gradient.
        weight: of the forward.
        weight_back: of the input gradient; where it is the same, so are the codes.
    """

    row: Tile
    column: Tile
    weight: Tile
    weight_back: Tile


TILES = {
    "tile": Tiles(ROW, COLUMN, BLOCK, BLOCK),
    "mxfp8": Tiles(Tile(1, 32), Tile(32, 1), Tile(1, 32), Tile(32, 1)),
    "tensor": Tiles(WHOLE, WHOLE, WHOLE, WHOLE),
    "delayed": Tiles(WHOLE, WHOLE, WHOLE, WHOLE),
}


@dataclass(frozen=True)
class EmulatedRounding(Rounding):
    """Operands on the FP8 grid, held in fp32; everything is E4M3 but what is said here.

    Args:
        inputs: width of the activations.
        tiles: which elements share a scale.
        gradients: format of output gradients.
        power_of_two: scales are powers of two.
        saved: format in which X is saved; None saves X itself.
        amax: largest values of earlier steps, for delayed scaling.
    """

    inputs: int
    tiles: Tiles
    gradients: Format = E4M3
    power_of_two: bool = False
    saved: Format | None = E4M3
    amax: DelayedAmax | None = None

    def activation(self, x_AI: Tensor, ends_E: Tensor | None) -> tuple[Any, Kept]:
        """Q_row(X); its own codes are saved, unless finer ones or none at all shall be."""
        x_AI = self._owned(x_AI, ends_E)
        if self.saved is E4M3:
            return self.operand_and_codes(x_AI, self.tiles.row, "activation")
        operand = self.operand(x_AI, self.tiles.row, E4M3, "activation")
        if self.saved is None:
            return operand, (x_AI,)
        _, kept = rounded_and_kept(x_AI, self.tiles.row, self.saved, power_of_two=True)
        return operand, (kept.codes, kept.scales)

    def activation_again(self, kept: Kept, ends_E: Tensor | None) -> Any:
        """Q_column(X'). With one scale for all, codes that were saved are it already."""
        if self.saved is None:
            return self._column(kept[0], E4M3, "activation", ends_E)
        codes, scales = kept
        stored = Quantised(codes, scales, self.tiles.row, self.saved, self.inputs)
        if self.saved is E4M3 and self.tiles.column == self.tiles.row:
            return self.operand_of(stored)
        return self._column(dequantise(stored), E4M3, "activation", ends_E, power_of_two=self.saved is E5M6)

    def weight(self, weight: Tensor) -> tuple[Any, Kept]:
        """Q_block(W); its codes are saved where the input gradient takes the same."""
        if self.tiles.weight_back == self.tiles.weight:
            return self.operand_and_codes(weight, self.tiles.weight, "weight")
        return self.operand(weight, self.tiles.weight, E4M3, "weight"), (weight,)

    def weight_again(self, kept: Kept) -> Any:
        """The same, or the weight rounded along its outputs (MX)."""
        if self.tiles.weight_back == self.tiles.weight:
            codes, scales = kept
            return self.operand_of(Quantised(codes, scales, self.tiles.weight, E4M3, self.inputs))
        return self.operand(kept[0], self.tiles.weight_back, E4M3, "weight")

    def gradient(self, dy_AO: Tensor, ends_E: Tensor | None) -> Any:
        """Q_row(dY)."""
        return self.operand(self._owned(dy_AO, ends_E), self.tiles.row, self.gradients, "gradient")

    def gradient_again(self, dy_AO: Tensor, ends_E: Tensor | None) -> Any:
        """Q_column(dY)."""
        return self._column(dy_AO, self.gradients, "gradient", ends_E)

    def seen(self, which: str, value: Tensor, ends_E: Tensor | None) -> None:
        """For delayed scaling: its largest magnitude."""
        if self.amax is not None:
            self.amax.take(which, tile_amax(self._owned(value, ends_E), WHOLE))

    def operand(
        self,
        x: Tensor,
        tile: Tile,
        form: Format,
        which: str,
        ends_E: Tensor | None = None,
        *,
        power_of_two: bool = False,
    ) -> Any:
        """What the products are taken of: x on the grid, in fp32."""
        power_of_two = power_of_two or self.power_of_two
        return rounded(x, tile, form, power_of_two=power_of_two, ends_E=ends_E, amax=self._known(which))

    def operand_of(self, stored: Quantised) -> Any:
        """The operand that codes stand for."""
        return dequantise(stored)

    def operand_and_codes(self, x: Tensor, tile: Tile, which: str) -> tuple[Any, Kept]:
        """Both at once, in E4M3."""
        known = self._known(which)
        values, stored = rounded_and_kept(x, tile, E4M3, power_of_two=self.power_of_two, amax=known)
        return values, (stored.codes, stored.scales)

    def _column(
        self, x_AI: Tensor, form: Format, which: str, ends_E: Tensor | None, *, power_of_two: bool = False
    ) -> Any:
        if self.tiles.column == WHOLE:
            x_AI, ends_E = self._owned(x_AI, ends_E), None
        return self.operand(x_AI, self.tiles.column, form, which, ends_E, power_of_two=power_of_two)

    def _owned(self, x_AI: Tensor, ends_E: Tensor | None) -> Tensor:
        """Rows that belong to nobody must not set the scale of those that do."""
        if ends_E is None or self.tiles.row != WHOLE:
            return x_AI
        rows_A = torch.arange(len(x_AI), device=x_AI.device)
        return x_AI.masked_fill((rows_A >= ends_E[-1])[:, None], 0)

    def _known(self, which: str) -> Tensor | None:
        return None if self.amax is None else self.amax.known(which)
