"""One matrix product per expert over rows that are sorted by expert: the op under every MoE layer.

`grouped_product(x_AI, weight_EOI, ends_E)`: rows [ends[e-1], ends[e]) times weight[e]^T. Rows past the last
end belong to no expert and come out as 0. It is a custom `torch.library` op, with fake, autograd and FLOP
formula, because `F.grouped_mm` rejects fp64 and odd strides, fails under `torch.compile` and on meta in
fp32, returns garbage past the last end and counts no FLOPs.

Two implementations: a loop over experts, right for every format and device, and `F.grouped_mm`. On CUDA that is one
kernel in bf16. On CPUs it is torch's own loop, in fp32, which takes a fifth less time where experts have few rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


def grouped_product(x_AI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the transposed weight of its expert.

    Args:
        x_AI: rows sorted by expert.
        weight_EOI: one [out, in] matrix for each expert, same format as the rows.
        ends_E: int32 or int64, where each expert's rows end; they never fall.

    Returns:
        y_AO, same format; rows past the last end are 0.
    """
    masks_outside = _masks_outside(x_AI)
    y_AO: Tensor = _product(x_AI, weight_EOI, ends_E, not masks_outside)
    return _zero_rest_(y_AO, ends_E) if masks_outside else y_AO


def grouped_outer(dy_AO: Tensor, x_AI: Tensor, ends_E: Tensor) -> Tensor:
    """dy^T x of each expert's rows, [E, out, in]: the weight gradient, for callers that form it themselves."""
    result: Tensor = _outer(dy_AO, x_AI, ends_E, True)
    return result


def _masks_outside(x: Tensor) -> bool:
    """Whether zeros are written outside the op: when compiled, that pass is fused with the next reader."""
    return torch.compiler.is_compiling() and x.is_cuda and _kernel_pays(x)


def _zero_rest_(y_AO: Tensor, ends_E: Tensor) -> Tensor:
    """Sets the rows past the last end to 0, in place."""
    # In a traced backward `len` of a tensor is a constant, and the graph would hold for this number of rows alone.
    rows = torch.arange(y_AO.shape[0], device=y_AO.device)
    return y_AO.masked_fill_((rows >= ends_E[-1])[:, None], 0)


def _zero_empty_(dw_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Sets the gradients of experts without rows to 0, in place."""
    empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    return dw_EOI.masked_fill_(empty_E[:, None, None], 0)


def _zero_rest_on_host_(y_AO: Tensor, ends_E: Tensor) -> Tensor:
    """`_zero_rest_` for CPUs, where the last end is known: it touches only those rows."""
    y_AO[int(ends_E[-1]) :] = 0
    return y_AO


def _zero_empty_on_host_(dw_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`_zero_empty_` for CPUs: it touches only the gradients of experts without rows."""
    for (begin, end), dw_OI in zip(_spans(ends_E), dw_EOI.unbind(0), strict=True):
        if begin == end:
            dw_OI.zero_()
    return dw_EOI


def _spans(ends_E: Tensor) -> list[tuple[int, int]]:
    """The begin and end of each expert's rows."""
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _kernel_pays(x: Tensor) -> bool:
    """Whether `F.grouped_mm` is faster than the loop: one kernel on CUDA in bf16, less of Python on CPUs in fp32."""
    if x.is_cuda:
        return not waits_on_gpu(x.dtype)
    return x.is_cpu and x.dtype == torch.float32


def waits_on_gpu(dtype: torch.dtype) -> bool:
    """Whether products of this format wait on a GPU until the host knows where each expert's rows end."""
    return dtype != torch.bfloat16


def _kernel_takes(rows_AX: Tensor, other: Tensor) -> bool:
    """Whether `F.grouped_mm` handles these: every width a multiple of 16 bytes, every matrix or its transpose dense."""
    axes = 2 if other.ndim == 3 else 1
    widths = (rows_AX.shape[-1], *other.shape[-axes:])
    aligned = all(width * rows_AX.element_size() % 16 == 0 for width in widths)
    other_dense = other.is_contiguous() or other.transpose(-1, -2).is_contiguous()
    dense = rows_AX.is_contiguous() and other_dense
    filled = rows_AX.numel() > 0
    same_format = rows_AX.dtype == other.dtype
    return _kernel_pays(rows_AX) and filled and same_format and aligned and dense


@torch.library.custom_op("moeloom::grouped_product", mutates_args=())
def _product(x_AI: Tensor, weight_EOI: Tensor, ends_E: Tensor, clean: bool) -> Tensor:
    """The products of `grouped_product`; unless `clean`, rows past the last end may hold anything."""
    if _kernel_takes(x_AI, weight_EOI):
        y_AO = F.grouped_mm(x_AI, weight_EOI.transpose(1, 2), offs=ends_E.to(torch.int32))
        zero_rest_ = _zero_rest_on_host_ if x_AI.is_cpu else _zero_rest_
        return zero_rest_(y_AO, ends_E) if clean else y_AO
    y_AO = x_AI.new_empty(x_AI.shape[0], weight_EOI.shape[1])
    last = 0
    for (begin, end), weight_OI in zip(_spans(ends_E), weight_EOI.unbind(0), strict=True):
        if end > begin:
            torch.mm(x_AI[begin:end], weight_OI.t(), out=y_AO[begin:end])
        last = end
    y_AO[last:] = 0
    return y_AO


@torch.library.custom_op("moeloom::grouped_outer", mutates_args=())
def _outer(dy_AO: Tensor, x_AI: Tensor, ends_E: Tensor, clean: bool) -> Tensor:
    """The products of `grouped_outer`; unless `clean`, that of an expert without rows may be anything."""
    if _kernel_takes(dy_AO, x_AI):
        dw_EOI = F.grouped_mm(dy_AO.t(), x_AI, offs=ends_E.to(torch.int32))
        zero_empty_ = _zero_empty_on_host_ if x_AI.is_cpu else _zero_empty_
        return zero_empty_(dw_EOI, ends_E) if clean else dw_EOI
    dw_EOI = x_AI.new_empty(len(ends_E), dy_AO.shape[1], x_AI.shape[1])
    for (begin, end), dw_OI in zip(_spans(ends_E), dw_EOI.unbind(0), strict=True):
        if end > begin:
            torch.mm(dy_AO[begin:end].t(), x_AI[begin:end], out=dw_OI)
        else:
            dw_OI.zero_()
    return dw_EOI


@_product.register_fake
def _(x_AI: Tensor, weight_EOI: Tensor, ends_E: Tensor, clean: bool) -> Tensor:
    return x_AI.new_empty(x_AI.shape[0], weight_EOI.shape[1])


@_outer.register_fake
def _(dy_AO: Tensor, x_AI: Tensor, ends_E: Tensor, clean: bool) -> Tensor:
    return x_AI.new_empty(ends_E.shape[0], dy_AO.shape[1], x_AI.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.clean = inputs[3]


def _backward(ctx: Any, dy_AO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x_AI, weight_EOI, ends_E = ctx.saved_tensors
    dy_AO = dy_AO.contiguous()  # expanded gradients (of a sum, say) have stride 0
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = _product(dy_AO, weight_EOI.transpose(1, 2), ends_E, ctx.clean)
        if not ctx.clean:
            dx = _zero_rest_(dx, ends_E)
    if ctx.needs_input_grad[1]:
        dw = _outer(dy_AO, x_AI, ends_E, ctx.clean)
        if not ctx.clean:
            dw = _zero_empty_(dw, ends_E)
    return dx, dw, None, None


_product.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.moeloom.grouped_product)
def _product_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * x_shape[0] * weight_shape[1] * weight_shape[2])


@register_flop_formula(torch.ops.moeloom.grouped_outer)
def _outer_flops(dy_shape: Any, x_shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * dy_shape[0] * dy_shape[1] * x_shape[1])
