"""The experts of many tokens in training on a CPU, as one function that keeps little for its backward.

Beside the matrices it keeps the tokens, which the router and the shared experts keep too, and the first product h. The
backward gathers the rows again and computes the activation a = swiglu(h) again. It needs no output of an expert: the
gradient of a gate, <dy, W a>, is <W^T dy, a>, and W^T dy is computed for the gradient of a in any case. SonicMoE (arXiv
2512.14080) does the same on GPUs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from core.model.activation import gate_and_up, swiglu, swiglu_gradient
from core.numerics import compiling
from core.numerics.grouped import grouped_outer, grouped_product
from core.routing.rows import SortedRows, sums_of_rows


def pays(x_TD: Tensor) -> bool:
    """Whether `gated_experts` is worth calling: in eager training on a CPU."""
    return torch.is_grad_enabled() and compiling.is_eager_on_cpu(x_TD)


def gated_experts(
    x_TD: Tensor,
    gate_up_EXD: Tensor,
    down_EDI: Tensor,
    rows: SortedRows,
    ends_E: Tensor,
    limit: float | None = None,
) -> Tensor:
    """The sum of gate * expert(x) over each token's K experts.

    Args:
        x_TD: the tokens.
        gate_up_EXD: the first matrix of every expert, X = 2 I.
        down_EDI: the second matrix of every expert.
        rows: which row is which token's, sorted by expert; every token has K of them.
        ends_E: int32, where each expert's rows end.
        limit: that of their SwiGLU; None: none.
    """
    x_TD = x_TD.to(gate_up_EXD.dtype)
    gate_TK = rows.gates().view(rows.tokens, rows.routing.choices).to(x_TD.dtype)
    y_TD: Tensor = _GatedExperts.apply(  # type: ignore[no-untyped-call]
        x_TD, gate_TK, gate_up_EXD, down_EDI, rows.order_A, rows.inverse_A, ends_E, limit
    )
    return y_TD


class _GatedExperts(torch.autograd.Function):
    """`gated_experts`, with its own backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_TK: Tensor,
        gate_up_EXD: Tensor,
        down_EDI: Tensor,
        order_A: Tensor,
        inverse_A: Tensor,
        ends_E: Tensor,
        limit: float | None,
    ) -> Tensor:
        choices = gate_TK.shape[1]
        ctx.limit = limit
        x_AD = x_TD.index_select(0, order_A // choices)
        h_AX = grouped_product(x_AD, gate_up_EXD, ends_E)
        del x_AD
        y_AD = grouped_product(swiglu(h_AX, limit), down_EDI, ends_E)
        ctx.save_for_backward(
            x_TD, gate_TK, gate_up_EXD, down_EDI, order_A, inverse_A, ends_E, h_AX
        )
        return sums_of_rows(y_AD, inverse_A, choices, gate_TK.reshape(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_TK, gate_up_EXD, down_EDI, order_A, inverse_A, ends_E, h_AX = ctx.saved_tensors
        choices = gate_TK.shape[1]
        token_A = order_A // choices
        gate_A = gate_TK.reshape(-1).index_select(0, order_A)
        gate_AI, up_AI = gate_and_up(h_AX, ctx.limit)
        silu_AI = F.silu(gate_AI)
        a_AI = silu_AI * up_AI
        rows_AD = dy_TD.index_select(0, token_A)
        da_AI = grouped_product(rows_AD, down_EDI.transpose(1, 2), ends_E)
        dgate_A = (da_AI * a_AI).sum(dim=1).index_select(0, inverse_A)
        a_AI.mul_(gate_A[:, None])
        ddown_EDI = grouped_outer(rows_AD, a_AI, ends_E) if ctx.needs_input_grad[3] else None
        del a_AI
        dh_AX = swiglu_gradient(h_AX, silu_AI, da_AI.mul_(gate_A[:, None]), ctx.limit)
        del silu_AI, da_AI
        dx_TD = dgate_up_EXD = None
        if ctx.needs_input_grad[2]:
            torch.index_select(x_TD, 0, token_A, out=rows_AD)
            dgate_up_EXD = grouped_outer(dh_AX, rows_AD, ends_E)
        del rows_AD
        if ctx.needs_input_grad[0]:
            dx_AD = grouped_product(dh_AX, gate_up_EXD.transpose(1, 2), ends_E)
            dx_TD = sums_of_rows(dx_AD, inverse_A, choices)
        return dx_TD, dgate_A.view_as(gate_TK), dgate_up_EXD, ddown_EDI, None, None, None, None
