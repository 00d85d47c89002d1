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

from core.numerics.number_formats import E4M3, E5M6, Format
from core.numerics.quantise import (
    BLOCK,
    COLUMN,
    ROW,
    WHOLE,
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
    """The elements of each operand that share a scale.

    Args:
        row: tile of activations and gradients, along the contraction of forward and input gradient.
        column: tile of both along tokens, for the weight gradient.
        weight: tile of the weight in the forward.
        weight_back: tile of the weight in the input gradient; if it is the same, so are the codes.
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
    """Operands on the FP8 grid, held in fp32; every format that is not an argument is E4M3.

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
        """Q_row(X), and what is saved: its own codes, finer codes, or X itself."""
        x_AI = self._owned(x_AI, ends_E)
        if self.saved is E4M3:
            return self.operand_and_codes(x_AI, self.tiles.row, "activation")
        operand = self.operand(x_AI, self.tiles.row, E4M3, "activation")
        if self.saved is None:
            return operand, (x_AI,)
        _, kept = rounded_and_kept(x_AI, self.tiles.row, self.saved, power_of_two=True)
        return operand, (kept.codes, kept.scales)

    def activation_again(self, kept: Kept, ends_E: Tensor | None) -> Any:
        """Q_column(X'); with one scale for all it has the saved codes."""
        if self.saved is None:
            return self._column(kept[0], E4M3, "activation", ends_E)
        codes, scales = kept
        stored = Quantised(codes, scales, self.tiles.row, self.saved, self.inputs)
        if self.saved is E4M3 and self.tiles.column == self.tiles.row:
            return self.operand_of(stored)
        x_AI = dequantise(stored)
        power_of_two = self.saved is E5M6
        return self._column(x_AI, E4M3, "activation", ends_E, power_of_two=power_of_two)

    def weight(self, weight: Tensor) -> tuple[Any, Kept]:
        """Q_block(W), and what is saved: its codes where the input gradient takes the same, else W."""
        if self.tiles.weight_back == self.tiles.weight:
            return self.operand_and_codes(weight, self.tiles.weight, "weight")
        return self.operand(weight, self.tiles.weight, E4M3, "weight"), (weight,)

    def weight_again(self, kept: Kept) -> Any:
        """Q_block(W) again, or W rounded along its outputs (MX)."""
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

    def observe(self, which: str, value: Tensor, ends_E: Tensor | None) -> None:
        """Takes the operand's largest magnitude, which delayed scaling needs."""
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
        """The operand of a product: x on the format's grid, in fp32."""
        power_of_two = power_of_two or self.power_of_two
        amax = self._known_amax(which)
        return rounded(x, tile, form, power_of_two=power_of_two, ends_E=ends_E, amax=amax)

    def operand_of(self, stored: Quantised) -> Any:
        """The operand that stored codes represent."""
        return dequantise(stored)

    def operand_and_codes(self, x: Tensor, tile: Tile, which: str) -> tuple[Any, Kept]:
        """The operand in E4M3, and the codes and scales that are saved."""
        amax = self._known_amax(which)
        values, stored = rounded_and_kept(x, tile, E4M3, power_of_two=self.power_of_two, amax=amax)
        return values, (stored.codes, stored.scales)

    def _column(
        self,
        x_AI: Tensor,
        form: Format,
        which: str,
        ends_E: Tensor | None,
        *,
        power_of_two: bool = False,
    ) -> Any:
        """The operand with tiles along tokens, which restart at each expert's first row."""
        if self.tiles.column == WHOLE:
            x_AI = self._owned(x_AI, ends_E)
            ends_E = None
        return self.operand(x_AI, self.tiles.column, form, which, ends_E, power_of_two=power_of_two)

    def _owned(self, x_AI: Tensor, ends_E: Tensor | None) -> Tensor:
        """x with the rows of no expert set to 0, if they would change the one scale of all."""
        if ends_E is None or self.tiles.row != WHOLE:
            return x_AI
        rows_A = torch.arange(len(x_AI), device=x_AI.device)
        return x_AI.masked_fill((rows_A >= ends_E[-1])[:, None], 0)

    def _known_amax(self, which: str) -> Tensor | None:
        """The largest magnitude of earlier steps, for delayed scaling."""
        return None if self.amax is None else self.amax.known(which)
