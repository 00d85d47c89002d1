"""Triton kernels that quantise in tiles with one read and one write, into the layouts that `scaled_mm` takes.

Codes and scales are those of `core.numerics.quantise.quantise` bit for bit; `codes.py` has their arithmetic.

Experts' rows, [begin, end) for expert e, are padded to whole multiples of a step S, and every expert starts at slot
begin // S + e. Slots never overlap (floor(end / S) + 1 - floor(begin / S) is at least ceil((end - begin) / S)), there
are at most A // S + E of them, and host and device know the place without a sum over experts or a transfer.

A matrix that is transposed is read as four tiles, with every fourth row from the first, second, third and fourth on.
Four codes that follow one another in a column are then in four registers of one thread and become one word. Words are
transposed instead of bytes, with fewer accesses to shared memory. Weights are transposed by a separate kernel: when
the one that quantises them did it too, Triton 3.6 gave wrong codes on an H100. So `faithful` is checked first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from plugins.fp8_native.codes import (
    decode,
    encode,
    fp32_of,
    largest,
    magnitude,
    pack_words,
    scale_of,
)
from plugins.fp8_native.operand import ROWS, SCALES, WIDTH

SPARE = ROWS - 1
"""Rows of codes past the last: an expert's padding is the rows after its own, and results there are not kept."""

E4M3 = torch.float8_e4m3fn
READ = (torch.float32, torch.bfloat16, torch.float16)
STEP = 16
"""Rows that one program of `quantise_rows` quantises."""
CHANNELS = 64
"""Columns that one program transposes."""

LANES = 32
"""The fewest lanes that read the ends; fewer would be another compilation and no faster."""

OPTIONS = {
    "quantise_rows": {"num_warps": 4},
    "quantise_transposed": {"num_warps": 4},
    "quantise_blocks": {"num_warps": 8},
    "transpose_blocks": {"num_warps": 4},
}

TILE = tl.constexpr(WIDTH)
WORDS = tl.constexpr(WIDTH // 4)
PAD = tl.constexpr(ROWS)


@triton.jit
def _owner(ends_ptr, slot, rows, experts, S: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a slot, the begin and end of its rows, and the slot's first row: the end, if it is empty."""
    if EXPERTS:
        each = tl.arange(0, EXPERTS)
        ends = tl.load(ends_ptr + each, mask=each < experts, other=0).to(tl.int32)
        expert = tl.sum(((ends // S + each + 1 <= slot) & (each < experts)).to(tl.int32), 0)
        begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
        end = tl.load(ends_ptr + expert, mask=expert < experts, other=0).to(tl.int32)
    else:
        expert, begin, end = slot * 0, slot * 0, rows
    return expert, begin, end, begin + (slot - begin // S - expert) * S


# ---- kernels


@triton.jit(do_not_specialize=["rows", "across", "experts"])
def _quantise_rows_kernel(
    x_ptr,
    ends_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    columns,
    stride,
    across,
    experts,
    EXPERTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    S: tl.constexpr,
):
    slot, column = tl.program_id(0) // across, tl.program_id(0) % across
    expert, begin, end, first = _owner(ends_ptr, slot, rows, experts, S, EXPERTS)
    if first < end:
        row = first + tl.arange(0, S)
        inner = column * TILE + tl.arange(0, TILE)
        there = (row < end)[:, None]
        far = row.to(tl.int64)[:, None]
        x = tl.load(
            x_ptr + far * stride + inner[None, :],
            mask=there & (inner < columns)[None, :],
            other=0.0,
        )
        x = fp32_of(x)
        scale = scale_of(tl.max(magnitude(x), 1), POWER_OF_TWO)
        tl.store(
            codes_ptr + far * (across * TILE) + inner[None, :],
            encode(x, scale[:, None]),
            mask=there,
        )
        padded = (end - begin + PAD - 1) // PAD * PAD
        start = ((begin // PAD + expert) * PAD).to(tl.int64) * across + column.to(tl.int64) * padded
        tl.store(scales_ptr + start + (row - begin), scale, mask=row - begin < padded)


@triton.jit
def _tokens(x_ptr, own_ptr, token, channel, begin, end, columns, stride, CODED: tl.constexpr):
    """The numbers of some tokens [tokens, channels], from codes by the scales in `own_ptr`; 0 past the end."""
    there = (token < end)[:, None] & (channel < columns)[None, :]
    x = tl.load(
        x_ptr + token.to(tl.int64)[:, None] * stride + channel[None, :], mask=there, other=0
    )
    if CODED:
        own = tl.load(own_ptr + (token - begin), mask=token < end, other=0.0)
        x = decode(x) * own[:, None]
    else:
        x = fp32_of(x)
    return x


@triton.jit(do_not_specialize=["rows", "across", "blocks", "experts"])
def _quantise_transposed_kernel(
    x_ptr,
    own_ptr,
    ends_ptr,
    words_ptr,
    scales_ptr,
    rows,
    columns,
    stride,
    across,
    blocks,
    outer,
    experts,
    EXPERTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    CODED: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    slot, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, begin, end, first = _owner(ends_ptr, slot, rows, experts, TILE, EXPERTS)
    if first < end:
        word = tl.arange(0, WORDS)
        token = first + 4 * word
        channel = block * CHANNELS + tl.arange(0, CHANNELS)
        padded = (end - begin + PAD - 1) // PAD * PAD
        start = ((begin // PAD + expert) * PAD).to(tl.int64) * across
        own_ptr += start + (block * CHANNELS // TILE).to(tl.int64) * padded
        a = _tokens(x_ptr, own_ptr, token, channel, begin, end, columns, stride, CODED)
        b = _tokens(x_ptr, own_ptr, token + 1, channel, begin, end, columns, stride, CODED)
        c = _tokens(x_ptr, own_ptr, token + 2, channel, begin, end, columns, stride, CODED)
        d = _tokens(x_ptr, own_ptr, token + 3, channel, begin, end, columns, stride, CODED)
        scale = scale_of(tl.max(largest(a, b, c, d), 0), POWER_OF_TWO)
        each = scale[None, :]
        words = tl.trans(
            pack_words(encode(a, each), encode(b, each), encode(c, each), encode(d, each))
        )
        length = (end - begin + TILE - 1) // TILE * TILE
        start = ((begin // TILE + expert) * TILE).to(tl.int64) * outer + (first - begin)
        place = channel.to(tl.int64)[:, None] * (length // 4) + word[None, :]
        tl.store(words_ptr + start // 4 + place, words, mask=(channel < outer)[:, None])
        tl.store(scales_ptr + slot.to(tl.int64) * outer + channel, scale, mask=channel < outer)


@triton.jit(do_not_specialize=["rows", "down", "across", "rows_padded", "length"])
def _quantise_blocks_kernel(
    w_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    columns,
    down,
    across,
    rows_padded,
    length,
    POWER_OF_TWO: tl.constexpr,
    MORE: tl.constexpr,
):
    j = tl.program_id(0) % across
    i = tl.program_id(0) // across % down
    matrix = (tl.program_id(0) // across // down).to(tl.int64)
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    w = fp32_of(
        tl.load(
            w_ptr + (matrix * rows + row)[:, None] * columns + column[None, :],
            mask=there,
            other=0.0,
        )
    )
    scale = scale_of(tl.max(tl.max(magnitude(w), 1), 0), POWER_OF_TWO)
    place = (matrix * rows_padded + row)[:, None] * (across * TILE) + column[None, :]
    tl.store(codes_ptr + place, encode(w, scale), mask=(row < rows_padded)[:, None])
    more = tl.arange(0, MORE)
    own = more < tl.where(j == across - 1, length - j, 1)
    tl.store(
        scales_ptr + (matrix * down + i) * length + j + more,
        tl.where(more == 0, scale, 1.0),
        mask=own,
    )


@triton.jit
def _bytes(codes_ptr, row, column, rows, width):
    """The codes of some rows [rows, columns]; 0 past the last row."""
    return tl.load(
        codes_ptr + row.to(tl.int64)[:, None] * width + column[None, :],
        mask=(row < rows)[:, None],
        other=0,
    )


@triton.jit(do_not_specialize=["rows", "down", "columns_padded"])
def _transpose_blocks_kernel(
    codes_ptr, words_ptr, rows, width, down, columns_padded, CHANNELS: tl.constexpr
):
    i, j = tl.program_id(0) % down, tl.program_id(0) // down
    matrix = tl.program_id(1).to(tl.int64)
    word = tl.arange(0, WORDS)
    row = i * TILE + 4 * word
    column = j * CHANNELS + tl.arange(0, CHANNELS)
    codes_ptr += matrix * rows * width
    a = _bytes(codes_ptr, row, column, rows, width)
    b = _bytes(codes_ptr, row + 1, column, rows, width)
    c = _bytes(codes_ptr, row + 2, column, rows, width)
    d = _bytes(codes_ptr, row + 3, column, rows, width)
    place = (matrix * columns_padded + column)[:, None] * (down * WORDS) + (i * WORDS + word)[
        None, :
    ]
    tl.store(
        words_ptr + place, tl.trans(pack_words(a, b, c, d)), mask=(column < columns_padded)[:, None]
    )


# ---- functions that launch the kernels


def quantise_rows(
    x_AI: Tensor, ends_E: Tensor | None, *, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Quantises each expert's rows in 1x128 tiles.

    Returns:
        FP8 codes [A + SPARE, I padded to 128], and fp32 scales in one dimension, of expert e [I / 128, rows padded to
        16] from slot begin // 16 + e. Memory of rows without an expert is not written.
    """
    x_AI = _readable(x_AI)
    count, columns = x_AI.shape
    across = triton.cdiv(columns, WIDTH)
    codes = x_AI.new_empty(count + SPARE, across * WIDTH, dtype=torch.uint8)
    scales = x_AI.new_empty(slots(count, ends_E, ROWS) * ROWS * across, dtype=torch.float32)
    if codes.numel() and count:
        ends, experts, lanes = _expert_arguments(ends_E, x_AI)
        grid = (slots(count, ends_E, STEP) * across,)
        sizes = (count, columns, x_AI.stride(0), across, experts)
        options = {
            "EXPERTS": lanes,
            "POWER_OF_TWO": power_of_two,
            "S": STEP,
            **OPTIONS["quantise_rows"],
        }
        _quantise_rows_kernel[grid](x_AI, ends, codes, scales, *sizes, **options)
    return codes.view(E4M3), scales


def quantise_transposed(
    x_AI: Tensor,
    scales: Tensor | None,
    ends_E: Tensor | None,
    *,
    count: int,
    columns: int,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    """Quantises the transpose of each expert's rows in 1x128 tiles along its tokens, padded with zeros.

    Args:
        x_AI: the rows, or codes as `quantise_rows` gives them.
        scales: the codes' scales; None where `x_AI` holds numbers.
        count: A.
        columns: I.

    Returns:
        FP8 codes in one dimension, of expert e [I padded to 16, tokens padded to 128] from slot begin // 128 + e; fp32
        scales [slots, I padded to 16].
    """
    x_AI = _readable(x_AI) if scales is None else x_AI.view(torch.uint8)
    outer = columns + -columns % ROWS
    number = slots(count, ends_E, WIDTH)
    words = x_AI.new_empty(number * WIDTH * outer // 4, dtype=torch.int32)
    found = x_AI.new_empty(number, outer, dtype=torch.float32)
    if words.numel() and count:
        ends, experts, lanes = _expert_arguments(ends_E, x_AI)
        across = triton.cdiv(columns, WIDTH)
        blocks = triton.cdiv(outer, CHANNELS)
        own = found if scales is None else scales
        sizes = (count, columns, x_AI.stride(0), across, blocks, outer, experts)
        options = {"EXPERTS": lanes, "POWER_OF_TWO": power_of_two, "CODED": scales is not None}
        options |= {"CHANNELS": CHANNELS, **OPTIONS["quantise_transposed"]}
        _quantise_transposed_kernel[(number * blocks,)](
            x_AI, own, ends, words, found, *sizes, **options
        )
    return words.view(E4M3), found


def quantise_blocks(weight_EOI: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Quantises matrices in 128x128 blocks.

    Returns:
        Codes [E, O padded to 16, I padded to 128], scales [E, O / 128, I / 128 padded to 4 with ones].
    """
    weight_EOI = _readable(weight_EOI).contiguous()
    matrices, count, columns = weight_EOI.shape
    down = triton.cdiv(count, WIDTH)
    across = triton.cdiv(columns, WIDTH)
    rows_padded = count + -count % ROWS
    length = across + -across % SCALES
    codes = weight_EOI.new_empty(matrices, rows_padded, across * WIDTH, dtype=torch.uint8)
    scales = weight_EOI.new_empty(matrices, down, length, dtype=torch.float32)
    if weight_EOI.numel():
        sizes = (count, columns, down, across, rows_padded, length)
        options = {"POWER_OF_TWO": power_of_two, "MORE": SCALES, **OPTIONS["quantise_blocks"]}
        _quantise_blocks_kernel[(matrices * down * across,)](
            weight_EOI, codes, scales, *sizes, **options
        )
    return codes.view(E4M3), scales


def transpose_blocks(codes: Tensor, scales: Tensor, *, columns: int) -> tuple[Tensor, Tensor]:
    """Transposes what `quantise_blocks` returned for matrices of I = `columns`; the codes stay the same.

    Returns:
        Codes [E, I padded to 16, O padded to 128], scales [E, I / 128, O / 128 padded to 4 with ones].
    """
    matrices, rows_padded, width = codes.shape
    down = triton.cdiv(rows_padded, WIDTH)
    across = triton.cdiv(columns, WIDTH)
    padded = columns + -columns % ROWS
    words = codes.new_empty(matrices, padded, down * WIDTH // 4, dtype=torch.int32)
    if words.numel():
        grid = (down * triton.cdiv(padded, CHANNELS), matrices)
        sizes = (rows_padded, width, down, padded)
        options = {"CHANNELS": CHANNELS, **OPTIONS["transpose_blocks"]}
        _transpose_blocks_kernel[grid](codes.view(torch.uint8), words, *sizes, **options)
    turned = scales.new_ones(matrices, across, down + -down % SCALES)
    turned[:, :, :down] = scales[:, :, :across].transpose(1, 2)
    return words.view(E4M3), turned


def slots(count: int, ends_E: Tensor | None, step: int) -> int:
    """The number of steps that hold all experts' rows, each expert's padded."""
    return triton.cdiv(count, step) if ends_E is None else count // step + len(ends_E)


def _expert_arguments(ends_E: Tensor | None, x: Tensor) -> tuple[Tensor, int, int]:
    """The kernels' arguments about experts: their ends, their number, and the lanes that read the ends (0: none)."""
    if ends_E is None:
        return x, 1, 0
    return ends_E, len(ends_E), max(LANES, triton.next_power_of_2(len(ends_E)))


def _readable(x: Tensor) -> Tensor:
    """x in a format that kernels read, with neighbouring columns side by side in memory."""
    x = x if x.dtype in READ else x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()
