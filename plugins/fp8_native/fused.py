"""The operands of `scaling: tile`, each made by one kernel, and products written straight into the result.

`NativeRounding` makes operands with torch alone, and still does so where there is no GPU or no Triton. Here the kernels
of `plugins.fp8_native.kernels` make the same codes and scales, in the layouts that `scaled_mm` takes.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from core.numerics.quantise import BLOCK, ROW
from core.numerics.quantised_product import Kept
from plugins.fp8_native import operand
from plugins.fp8_native.ends import Spans, spans
from plugins.fp8_native.operand import ROWS, WIDTH, Laid, Operand
from plugins.fp8_native.rounding import TILES, NativeRounding


@cache
def kernels() -> ModuleType | None:
    """The module of the kernels; None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from plugins.fp8_native import kernels as found

    return found


def takes(x: Tensor, power_of_two: bool) -> bool:
    """Whether the kernels quantise x: on a GPU, if they are available and have been verified.

    The answer is the same for all operands of a layer, whatever their format: `product` and `outer` take no mixture.
    """
    return x.is_cuda and faithful(str(x.device), power_of_two)


@dataclass(frozen=True)
class Rows:
    """Each expert's rows in 1x128 tiles, as `kernels.quantise_rows` returns them."""

    codes: Tensor
    scales: Tensor
    count: int

    def parts(self, where: Spans) -> Iterator[Laid]:
        """The operand of each expert; rows that pad it are the next expert's, and their results are not kept."""
        codes = self.codes
        scales = self.scales
        recipe = operand.RECIPES[ROW]
        across = codes.shape[1] // WIDTH
        for expert, (begin, end) in enumerate(where):
            size = _up(end - begin, ROWS)
            first = (begin // ROWS + expert) * ROWS * across
            own_scales = scales.as_strided((size, across), (1, size), first)
            yield Laid(codes.narrow(0, begin, size), own_scales, recipe)


@dataclass(frozen=True)
class Turned:
    """The transpose of each expert's rows in tiles along its tokens, as `kernels.quantise_transposed` returns them."""

    codes: Tensor
    scales: Tensor
    outer: int
    count: int

    def parts(self, where: Spans) -> Iterator[Laid]:
        """The operand [I, tokens] of each expert."""
        padded = self.scales.shape[1]
        recipe = operand.RECIPES[ROW]
        scales = self.scales.t()
        for expert, (begin, end) in enumerate(where):
            slot = begin // WIDTH + expert
            size = _up(end - begin, WIDTH)
            codes = self.codes.as_strided((padded, size), (size, 1), slot * WIDTH * padded)
            yield Laid(codes, scales.narrow(1, slot, size // WIDTH), recipe)


@dataclass(frozen=True)
class Blocks:
    """Matrices in 128x128 blocks, as `kernels.quantise_blocks` returns them; `outer` of their rows are not padding."""

    codes: Tensor
    scales: Tensor
    outer: int

    def parts(self) -> Iterator[Laid]:
        """The operand of each matrix."""
        recipe = operand.RECIPES[BLOCK]
        each_scales = self.scales.transpose(1, 2).unbind(0)
        for codes, scales in zip(self.codes.unbind(0), each_scales, strict=True):
            yield Laid(codes, scales, recipe)


@dataclass(frozen=True)
class FusedRounding(NativeRounding):
    """`NativeRounding` in tiles, whose operands kernels make if they can run."""

    def activation(self, x_AI: Tensor, ends_E: Tensor | None) -> tuple[Any, Kept]:
        """Q(X) by rows, and what is saved: its codes and scales, or X."""
        if not self._fused(x_AI):
            return super().activation(x_AI, ends_E)
        # The host waits for the ends here, before this layer's kernels are queued.
        spans(len(x_AI), ends_E)
        rows = self._rows(x_AI, ends_E)
        kept: Kept = (x_AI,)
        if self.codes_again:
            kept = (rows.codes, rows.scales)
        return rows, kept

    def activation_again(self, kept: Kept, ends_E: Tensor | None) -> Any:
        """Q(X') along tokens."""
        if not self._fused(kept[0]):
            return super().activation_again(kept, ends_E)
        if not self.codes_again:
            return self._turned(kept[0], None, len(kept[0]), self.inputs, ends_E)
        codes, scales = kept
        return self._turned(codes, scales, len(codes) - _kernels().SPARE, self.inputs, ends_E)

    def weight(self, weight: Tensor) -> tuple[Any, Kept]:
        """Q(W), and its codes and scales, which are saved."""
        if not self._fused(weight):
            return super().weight(weight)
        each = weight if weight.ndim == 3 else weight[None]
        made = self._blocks(each)
        return made, (made.codes, made.scales)

    def weight_again(self, kept: Kept) -> Any:
        """Q(W) transposed, with the same codes."""
        if not self._fused(kept[0]):
            return super().weight_again(kept)
        return self._flipped(*kept)

    def gradient(self, dy_AO: Tensor, ends_E: Tensor | None) -> Any:
        """Q(dY) by rows."""
        if self._fused(dy_AO):
            return self._rows(dy_AO, ends_E)
        return super().gradient(dy_AO, ends_E)

    def gradient_again(self, dy_AO: Tensor, ends_E: Tensor | None) -> Any:
        """Q(dY) along tokens."""
        if not self._fused(dy_AO):
            return super().gradient_again(dy_AO, ends_E)
        count, columns = dy_AO.shape
        return self._turned(dy_AO, None, count, columns, ends_E)

    def product(self, rows: Any, weight: Any, ends_E: Tensor | None) -> Tensor:
        """rows @ weight^T, [A, O]; rows of no expert are 0, and an expert's padding is overwritten by the next."""
        if not isinstance(rows, Rows):
            return super().product(rows, weight, ends_E)
        where = spans(rows.count, ends_E)
        y_PO = rows.scales.new_empty(len(rows.codes), weight.codes.shape[1], dtype=self.dtype)
        for (begin, end), own, matrix in zip(where, rows.parts(where), weight.parts(), strict=True):
            if end > begin:
                operand.multiply_into(y_PO.narrow(0, begin, own.codes.shape[0]), own, matrix)
        if where[-1][1] < rows.count:
            y_PO[where[-1][1] : rows.count] = 0
        return _dense(y_PO[: rows.count, : weight.outer])

    def outer(self, dy: Any, x: Any, ends_E: Tensor | None) -> Tensor:
        """dy^T x for each expert, [O, I] or [E, O, I], in fp32."""
        if not isinstance(dy, Turned):
            return super().outer(dy, x, ends_E)
        where = spans(dy.count, ends_E)
        dw_EOI = dy.scales.new_empty(len(where), dy.scales.shape[1], x.scales.shape[1])
        each = zip(where, dw_EOI.unbind(0), dy.parts(where), x.parts(where), strict=True)
        for (begin, end), dw_OI, own, other in each:
            if end > begin:
                operand.multiply_into(dw_OI, own, other)
            else:
                dw_OI.zero_()
        cut = dw_EOI[:, : dy.outer, : x.outer]
        if ends_E is None:
            cut = cut[0]
        return _dense(cut)

    def path(self, x: Tensor | None) -> str:
        """The code that takes the products of x and, if there is an x, the code that makes the operands."""
        products = super().path(x)
        if x is None:
            return products
        maker = "Triton" if self._fused(x) else "torch"
        return f"{products}, operands by {maker}"

    def _fused(self, x: Tensor) -> bool:
        return takes(x, self.power_of_two)

    def _rows(self, x_AI: Tensor, ends_E: Tensor | None) -> Rows:
        codes, scales = _launched("quantise_rows", x_AI, ends_E, power_of_two=self.power_of_two)
        return Rows(codes, scales, len(x_AI))

    def _blocks(self, weight_EOI: Tensor) -> Blocks:
        codes, scales = _launched("quantise_blocks", weight_EOI, power_of_two=self.power_of_two)
        return Blocks(codes, scales, weight_EOI.shape[1])

    def _flipped(self, codes: Tensor, scales: Tensor) -> Blocks:
        codes, scales = _launched("transpose_blocks", codes, scales, columns=self.inputs)
        return Blocks(codes, scales, self.inputs)

    def _turned(
        self, x_AI: Tensor, scales: Tensor | None, count: int, columns: int, ends_E: Tensor | None
    ) -> Turned:
        options = {"count": count, "columns": columns, "power_of_two": self.power_of_two}
        codes, own_scales = _launched("quantise_transposed", x_AI, scales, ends_E, **options)
        return Turned(codes, own_scales, columns, count)


TRIED = ((256, [0, 131, 300]), (200, [0, 131] + 40 * [300]))
"""Widths and ends with which kernels are verified: Triton compiles separately for multiples of 16 and other widths, and
for few and many experts."""


@cache
@torch.no_grad()
def faithful(device: str, power_of_two: bool) -> bool:
    """Whether every kernel gives the bits of torch's own operations on some numbers; if not, it warns once.

    A compiler can break a kernel on one device and no other, or for one kind of argument, and loss curves would not
    show it. So every variant that Triton compiles for a layer is verified: `TRIED`, with and without experts, in both
    formats. It compiles separately for each power of two of experts, and two of these are verified.
    """
    try:
        if kernels() is None:
            return False
        for width, ends in TRIED:
            x_AI, w_EOI = _examples(ends[-1] + 10, width, len(ends))
            for dtype in (torch.bfloat16, torch.float32):
                own_x = x_AI.to(device, dtype)
                own_w = w_EOI.to(device)
                ends_E = torch.tensor(ends, dtype=torch.int32, device=device)
                for rows, weight, groups_E in ((own_x, own_w, ends_E), (own_x, own_w[-1], None)):
                    if not all(_compared(rows, weight, groups_E, power_of_two)):
                        return _warn("do not give the bits of torch's operations")
    except Exception as cause:  # Triton raises what its compiler, the C compiler's process, the driver and ctypes raise
        first_line = str(cause).strip().partition("\n")[0]
        return _warn(f"cannot run ({type(cause).__name__}: {first_line})")
    return True


def _warn(why: str) -> bool:
    """Warns that the kernels are not used, and returns False."""
    message = f"fp8_native: its kernels {why} on this device, so torch's operations make operands and products instead"
    warnings.warn(message, stacklevel=3)
    return False


def _examples(rows: int, width: int, experts: int) -> tuple[Tensor, Tensor]:
    """Rows and matrices of many sizes, with tiles that are zero, infinite, and NaN; the last matrix is finite."""
    draw = torch.Generator().manual_seed(0)
    x_AI = torch.randn(rows, width, generator=draw) * torch.logspace(-9, 9, rows)[:, None]
    w_EOI = torch.randn(experts, 144, width, generator=draw) * torch.logspace(-3, 3, width)
    x_AI[7] = 0
    x_AI[:, 5] = 0
    x_AI[9, 3] = torch.nan
    x_AI[135, 130] = -torch.inf
    w_EOI[0, 140, 3] = torch.nan
    w_EOI[0, 5, 130] = torch.inf
    w_EOI[1, :128, :128] = 0
    return x_AI, w_EOI


def _compared(
    x_AI: Tensor, weight: Tensor, ends_E: Tensor | None, power_of_two: bool
) -> Iterator[bool]:
    """Whether each kernel's operands and their products are those of `NativeRounding`, one after the other."""
    where = spans(len(x_AI), ends_E)
    width = x_AI.shape[1]
    own = FusedRounding(width, TILES["tile"], torch.float32, power_of_two)
    plain = NativeRounding(width, TILES["tile"], torch.float32, power_of_two)
    whole, kept = plain.activation(x_AI, ends_E)
    matrices, kept_w = plain.weight(weight)
    rows = own._rows(x_AI, ends_E)
    weight_EOI = weight if weight.ndim == 3 else weight[None]
    blocks = own._blocks(weight_EOI)
    turned = own._turned(x_AI, None, len(x_AI), width, ends_E)
    again = own._turned(rows.codes, rows.scales, len(x_AI), width, ends_E)
    flipped = own._flipped(blocks.codes, blocks.scales)
    tokens = plain._along_tokens(x_AI, ends_E)
    tokens_again = plain.activation_again(kept, ends_E)
    rows_right = [whole.part(*span) for span in where]
    for found, right in (
        (rows.parts(where), rows_right),
        (turned.parts(where), tokens),
        (again.parts(where), tokens_again),
        (blocks.parts(), matrices),
        (flipped.parts(), plain.weight_again(kept_w)),
    ):
        yield all(_same(*pair) for pair in zip(found, right, strict=True))
    yield _close(own.product(rows, blocks, ends_E), plain.product(whole, matrices, ends_E))
    yield _close(own.outer(turned, again, ends_E), plain.outer(tokens, tokens_again, ends_E))


def _same(laid: Laid, right: Operand) -> bool:
    """Whether codes and scales are equal, without padding; the two codes of NaN are equal."""
    down, across = right.codes.shape
    codes = laid.codes[:down, :across].contiguous().view(torch.uint8)
    codes_right = right.codes.contiguous().view(torch.uint8)
    scales = laid.scales.t() if right.tile == BLOCK else laid.scales
    scales = scales[: right.scales.shape[0], : right.scales.shape[1]]
    same = (codes == codes_right) | (codes & codes_right & 0x7F == 0x7F)
    return bool(same.all()) and torch.equal(scales.nan_to_num(-1), right.scales.nan_to_num(-1))


def _close(found: Tensor, right: Tensor) -> bool:
    """Whether products are equal up to the order of sums; wrong scales or non-zero padding are far beyond that."""
    bound = 1e-3 * right.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
    same = ((found - right).abs() <= bound) | (found == right) | (found.isnan() & right.isnan())
    return bool(same.all())


def _launched(kernel: str, x: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The codes and scales that a kernel makes of x; it is launched on x's device, not on the current one."""
    with torch.cuda.device_of(x):
        made: tuple[Tensor, Tensor] = getattr(_kernels(), kernel)(x, *others, **options)
    return made


def _kernels() -> ModuleType:
    found = kernels()
    assert found is not None, "`takes` has been checked first"
    return found


def _dense(cut: Tensor) -> Tensor:
    """A dense tensor that is not a view, because autograd would forbid to change a view in place."""
    return cut.contiguous().detach()


def _up(size: int, multiple: int) -> int:
    """The size rounded up to a multiple."""
    return size + -size % multiple
