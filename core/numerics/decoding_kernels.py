"""Triton kernels for a few tokens, where a GPU waits for the start of kernels rather than for memory.

Each does in one kernel what torch does in three to seven. Sums are in fp32, whatever the format of the operands, and
results are rounded once. `core.model.few_tokens` says when they are used, and has the same functions in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTPUTS = 16
"""Rows of a matrix that one program multiplies."""

STEP = 256
"""Elements of a row that are read at once."""


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    expert_ptr,
    out_ptr,
    width,
    inner,
    choices,
    limit,
    CLAMPED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """silu(gate) * up of one assignment, for some of the inner elements; both are clamped if CLAMPED."""
    assignment = tl.program_id(0)
    token = assignment // choices
    expert = tl.load(expert_ptr + assignment)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = outputs < inner
    matrix_ptr = weight_ptr + expert * (2 * inner) * width
    gate_ptr = matrix_ptr + outputs[:, None] * width
    up_ptr = matrix_ptr + (inner + outputs)[:, None] * width
    gate = tl.zeros([OUTPUTS], dtype=tl.float32)
    up = tl.zeros([OUTPUTS], dtype=tl.float32)
    for begin in range(0, width, STEP):
        columns = begin + tl.arange(0, STEP)
        present = columns < width
        read = inside[:, None] & present[None, :]
        x = tl.load(x_ptr + token * width + columns, mask=present, other=0.0).to(tl.float32)
        gate_rows = tl.load(gate_ptr + columns[None, :], mask=read, other=0.0).to(tl.float32)
        up_rows = tl.load(up_ptr + columns[None, :], mask=read, other=0.0).to(tl.float32)
        gate += tl.sum(gate_rows * x[None, :], 1)
        up += tl.sum(up_rows * x[None, :], 1)
    if CLAMPED:  # comparisons keep NaN, which tl.minimum does not
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, up)
        up = tl.where(up < -limit, -limit, up)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(
        out_ptr + assignment * inner + outputs, hidden.to(out_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _down_kernel(
    hidden_ptr,
    weight_ptr,
    expert_ptr,
    gate_ptr,
    out_ptr,
    width,
    inner,
    choices,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gated sum over the experts of one token, for some of the outputs."""
    token = tl.program_id(0)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = outputs < width
    total = tl.zeros([OUTPUTS], dtype=tl.float32)
    for choice in range(choices):
        assignment = token * choices + choice
        expert = tl.load(expert_ptr + assignment)
        gate = tl.load(gate_ptr + assignment).to(tl.float32)
        rows_ptr = weight_ptr + expert * width * inner + outputs[:, None] * inner
        found = tl.zeros([OUTPUTS], dtype=tl.float32)
        for begin in range(0, inner, STEP):
            columns = begin + tl.arange(0, STEP)
            present = columns < inner
            hidden = tl.load(hidden_ptr + assignment * inner + columns, mask=present, other=0.0)
            read = inside[:, None] & present[None, :]
            rows = tl.load(rows_ptr + columns[None, :], mask=read, other=0.0).to(tl.float32)
            found += tl.sum(rows * hidden.to(tl.float32)[None, :], 1)
        total += gate * found
    tl.store(out_ptr + token * width + outputs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, stride, width, eps, WIDTH: tl.constexpr):
    """x / rms(x) * weight of one row."""
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    present = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=present, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=present, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    normed = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, normed, mask=present)


@triton.jit
def _softmax_kernel(
    scores_ptr, mask_ptr, out_ptr, seen, scale, MASKED: tl.constexpr, SEEN: tl.constexpr
):
    """The softmax of one row of scaled scores, over those that are not masked."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SEEN)
    present = columns < seen
    if MASKED:
        visible = tl.load(mask_ptr + row * seen + columns, mask=present, other=0)
        present = present & (visible != 0)
    scores = tl.load(scores_ptr + row * seen + columns, mask=present, other=-float("inf")) * scale
    powers = tl.exp(scores - tl.max(scores, 0))
    weights = powers / tl.sum(powers, 0)
    tl.store(
        out_ptr + row * seen + columns,
        weights.to(out_ptr.dtype.element_ty),
        mask=columns < seen,
    )


def gated_experts(
    x_TD: Tensor,
    gate_up_EXD: Tensor,
    down_EDI: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    limit: float | None = None,
) -> Tensor:
    """The sum of gate * expert(x) over each token's K experts, in the format of the matrices; all are contiguous.

    With a limit the SwiGLU of the experts is clamped.
    """
    tokens, choices = expert_TK.shape
    width, inner = down_EDI.shape[1:]
    hidden_AI = x_TD.new_empty(tokens * choices, inner, dtype=down_EDI.dtype)
    grid = (tokens * choices, triton.cdiv(inner, OUTPUTS))
    clamped = limit is not None
    bound = float(limit) if limit is not None else 0.0
    _gate_up_kernel[grid](
        x_TD,
        gate_up_EXD,
        expert_TK,
        hidden_AI,
        width,
        inner,
        choices,
        bound,
        CLAMPED=clamped,
        OUTPUTS=OUTPUTS,
        STEP=STEP,
    )
    y_TD = x_TD.new_empty(tokens, width, dtype=down_EDI.dtype)
    grid = (tokens, triton.cdiv(width, OUTPUTS))
    _down_kernel[grid](
        hidden_AI, down_EDI, expert_TK, gate_TK, y_TD, width, inner, choices, OUTPUTS, STEP
    )
    return y_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight in the format of x; rows may be apart, their elements not."""
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    rows, width = x_TD.shape
    normed_TD = x_TD.new_empty(rows, width)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows,)](x_TD, weight_D, normed_TD, x_TD.stride(0), width, eps, WIDTH=block)
    return normed_TD


def masked_softmax(
    scores_BAS: Tensor, mask_BAS: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """The softmax over S of scale * scores, where the mask is True, in a format; scores and mask are contiguous."""
    rows, queries, seen = scores_BAS.shape
    weights_BAS = torch.empty_like(scores_BAS, dtype=dtype)
    masked = mask_BAS is not None
    mask = mask_BAS.view(torch.int8) if mask_BAS is not None else scores_BAS
    block = triton.next_power_of_2(seen)
    _softmax_kernel[(rows * queries,)](
        scores_BAS, mask, weights_BAS, seen, scale, MASKED=masked, SEEN=block
    )
    return weights_BAS
