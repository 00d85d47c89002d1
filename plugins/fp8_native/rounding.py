"""The operands of a layer's three products, and the products by `scaled_mm` (report, section 3.3.2 and figure 7).

    Y  = Q1x128(X)    Q128x128(W)^T
    dX = Q1x128(dY)   Q128x128(W)          the same quantised W
    dW = Q128x1(dY)^T Q128x1(X')           tiles along tokens, restarted at each expert's first row

A 128x1 tile of a matrix is a 1x128 tile of its transpose, which is the kernel's operand. `scaled_mm` has no grouped
form with such scales: experts follow one another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.numerics.number_formats import E4M3
from core.numerics.quantise import BLOCK, ROW, WHOLE, Quantised, Tile, dequantise, quantise
from core.numerics.quantised_product import Kept, Rounding
from plugins.fp8_native.ends import spans
from plugins.fp8_native.operand import CHANNEL, Operand, multiply


@dataclass(frozen=True)
class Tiles:
    """The elements of an operand that share a scale, with the contraction along its rows.

    Args:
        rows: tile of activations and gradients.
        weight: tile of weights.
        words: both in words, for logs.
    """

    rows: Tile
    weight: Tile
    words: str


TILES = {
    "tile": Tiles(ROW, BLOCK, "1x128 / 128x128"),
    "row": Tiles(CHANNEL, CHANNEL, "rows"),
    "tensor": Tiles(WHOLE, WHOLE, "tensors"),
}


@dataclass(frozen=True)
class NativeRounding(Rounding):
    """Operands that stay E4M3 codes; see `core.numerics.quantised_product.Rounding`.

    Args:
        inputs: width of the activations.
        tiles: which elements share a scale.
        dtype: format of outputs and input gradients; weight gradients are fp32.
        power_of_two: scales are powers of two.
        codes_again: X' is the saved FP8 tensor, and not X itself.
    """

    inputs: int
    tiles: Tiles
    dtype: torch.dtype
    power_of_two: bool = False
    codes_again: bool = True

    def path(self, x: Tensor | None) -> str:
        """The code that takes the products of x, in words; None: as far as it is known without an operand.

        For example `torch scaled_mm, e4m3 1x128 / 128x128`.
        """
        scales = ", ue8m0 scales" if self.power_of_two else ""
        return f"torch scaled_mm, e4m3 {self.tiles.words}{scales}"

    def activation(self, x_AI: Tensor, ends_E: Tensor | None) -> tuple[Any, Kept]:
        """Q(X) by rows, and what is saved: its codes and scales, or X."""
        stored = self._quantise(self._owned(x_AI, ends_E), self.tiles.rows)
        kept: Kept = (x_AI,)
        if self.codes_again:
            kept = (stored.codes, stored.scales)
        return Operand.of(stored), kept

    def activation_again(self, kept: Kept, ends_E: Tensor | None) -> Any:
        """Q(X') along tokens, one operand [I, tokens] for each expert."""
        if not self.codes_again:
            return self._along_tokens(kept[0], ends_E)
        codes, scales = kept
        stored = Quantised(codes, scales, self.tiles.rows, E4M3, self.inputs)
        if self.tiles.rows == WHOLE:
            return self._split(stored, ends_E)
        return self._along_tokens(dequantise(stored), ends_E)

    def weight(self, weight: Tensor) -> tuple[Any, Kept]:
        """Q(W), one operand [O, I] for each expert, and what is saved: its codes, or W where dX needs other ones."""
        stored = self._quantise(weight, self.tiles.weight)
        kept: Kept = (stored.codes, stored.scales)
        if self.tiles.weight == CHANNEL:
            kept = (weight,)
        operands = _each(stored.codes, stored.scales)
        return [Operand(*both, self.tiles.weight) for both in operands], kept

    def weight_again(self, kept: Kept) -> Any:
        """Q(W) transposed, [I, O]; with a scale for each row, W quantised by its columns."""
        if self.tiles.weight == CHANNEL:
            turned = self._quantise(kept[0].transpose(-1, -2), CHANNEL)
            return [Operand(*both, CHANNEL) for both in _each(turned.codes, turned.scales)]
        return [Operand(*both, self.tiles.weight).transposed() for both in _each(*kept)]

    def gradient(self, dy_AO: Tensor, ends_E: Tensor | None) -> Any:
        """Q(dY) by rows."""
        return Operand.of(self._quantise(self._owned(dy_AO, ends_E), self.tiles.rows))

    def gradient_again(self, dy_AO: Tensor, ends_E: Tensor | None) -> Any:
        """Q(dY) along tokens, one operand [O, tokens] for each expert."""
        if self.tiles.rows == WHOLE:
            return self._split(self._quantise(self._owned(dy_AO, ends_E), WHOLE), ends_E)
        return self._along_tokens(dy_AO, ends_E)

    def product(self, rows: Any, weight: Any, ends_E: Tensor | None) -> Tensor:
        """rows @ weight^T, [A, O]; rows of no expert are 0."""
        parts = []
        for span, own in zip(spans(len(rows.codes), ends_E), weight, strict=True):
            parts.append(multiply(rows.part(*span), own, self.dtype))
        done = sum(map(len, parts))
        rest = rows.scales.new_zeros(len(rows.codes) - done, len(weight[0].codes), dtype=self.dtype)
        if len(rest) or len(parts) > 1:
            return torch.cat([*parts, rest])
        return parts[0]

    def product_back(self, rows: Any, weight: Any, ends_E: Tensor | None) -> Tensor:
        """rows @ weight, [A, I], of weights that are transposed already."""
        return self.product(rows, weight, ends_E)

    def outer(self, dy: Any, x: Any, ends_E: Tensor | None) -> Tensor:
        """dy^T x for each expert, [O, I] or [E, O, I], in fp32."""
        each = [multiply(own, other, torch.float32) for own, other in zip(dy, x, strict=True)]
        return each[0] if ends_E is None else torch.stack(each)

    def _quantise(self, x: Tensor, tile: Tile) -> Quantised:
        return quantise(x, tile, E4M3, power_of_two=self.power_of_two)

    def _along_tokens(self, x_AI: Tensor, ends_E: Tensor | None) -> list[Operand]:
        """The transpose of each expert's rows, quantised along its tokens."""
        operands = []
        for begin, end in spans(len(x_AI), ends_E):
            operands.append(Operand.of(self._quantise(x_AI[begin:end].t(), self.tiles.rows)))
        return operands

    def _split(self, stored: Quantised, ends_E: Tensor | None) -> list[Operand]:
        """Splits codes that share one scale into each expert's rows, and transposes them; nothing is rounded again."""
        whole = Operand.of(stored)
        return [whole.part(*span).transposed() for span in spans(len(stored.codes), ends_E)]

    def _owned(self, x_AI: Tensor, ends_E: Tensor | None) -> Tensor:
        """x with the rows of no expert set to 0, if they would change the one scale of all."""
        if ends_E is None or self.tiles.rows != WHOLE:
            return x_AI
        rows_A = torch.arange(len(x_AI), device=x_AI.device)
        return x_AI.masked_fill((rows_A >= ends_E[-1])[:, None], 0)


def _each(codes: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes and scales of every expert's matrix, or of the only one."""
    if codes.ndim == 2:
        return iter([(codes, scales)])
    return zip(codes.unbind(0), scales.unbind(0), strict=True)
