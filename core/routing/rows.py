"""Dispatch within one device: rows are sorted by expert, and results are put back in the tokens' order.

Rows are moved by `index_select` along a permutation, and moved back along its inverse, so that forward and
backward are gathers: deterministic on every device, no atomic additions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from core.contracts.counting import ends_of
from core.contracts.dispatcher import Handle
from core.contracts.router import Routing
from core.numerics import compiling


class _Permute(torch.autograd.Function):
    """x[order]; the gradient is dy[inverse]."""

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_A)
        return x_AD.index_select(0, order_A)

    @staticmethod
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_A,) = ctx.saved_tensors
        return dy_AD.index_select(0, inverse_A), None, None


class _Spread(torch.autograd.Function):
    """Row order[a] // K of x for each assignment a; a token's gradient is the sum of those of its K rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_A: Tensor, inverse_A: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse_A)
        ctx.choices = choices
        return x_TD.index_select(0, order_A // choices)

    @staticmethod
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_A,) = ctx.saved_tensors
        if compiling.is_eager_on_cpu(dy_AD):
            return sums_of_rows(dy_AD, inverse_A, ctx.choices), None, None, None
        dy_TKD = dy_AD.index_select(0, inverse_A).unflatten(0, (-1, ctx.choices))
        return dy_TKD.sum(dim=1), None, None, None


class _GatedSum(torch.autograd.Function):
    """The sum over k of gate[t, k] * y[inverse[t K + k]] for each token t, without the rows in the tokens' order."""

    @staticmethod
    def forward(
        ctx: Any, y_AD: Tensor, gate_TK: Tensor, order_A: Tensor, inverse_A: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_AD, gate_TK, order_A, inverse_A)
        return sums_of_rows(y_AD, inverse_A, gate_TK.shape[1], gate_TK.reshape(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_AD, gate_TK, order_A, inverse_A = ctx.saved_tensors
        dy_AD = dy_TD.index_select(0, order_A // gate_TK.shape[1])
        dgate_A = (dy_AD * y_AD).sum(dim=1).index_select(0, inverse_A)
        gate_A = gate_TK.reshape(-1).index_select(0, order_A)
        return dy_AD.mul_(gate_A[:, None]), dgate_A.view_as(gate_TK), None, None


def sums_of_rows(
    rows_AD: Tensor, index_A: Tensor, choices: int, weight_A: Tensor | None = None
) -> Tensor:
    """The sum of K rows for each token, weighted if there are weights.

    Args:
        rows_AD: the rows.
        index_A: int64, the rows of token t in its elements t K to t K + K - 1.
        choices: K.
        weight_A: a factor for each element of `index_A`.
    """
    index_TK = index_A.view(-1, choices)
    if weight_A is not None:
        weight_A = weight_A.view_as(index_TK)
    return F.embedding_bag(index_TK, rows_AD, mode="sum", per_sample_weights=weight_A)


def _weighted_sum(gate_TK: Tensor, y_TKD: Tensor) -> Tensor:
    """The sum of each token's choices, weighted by their gates.

    A compiler fuses the plain form with the gather before it, but not the einsum.
    """
    if torch.compiler.is_compiling() and y_TKD.is_cuda:
        return (gate_TK[:, :, None] * y_TKD).sum(dim=1)
    return torch.einsum("tk,tkd->td", gate_TK, y_TKD)


@dataclass(frozen=True)
class Done(Handle):
    """A handle whose result is there already."""

    value: Any

    def wait(self) -> Any:
        """The result."""
        return self.value


@dataclass(frozen=True)
class SortedRows:
    """How rows are sorted by expert: what `gated_sums` needs.

    Args:
        routing: the routing of the tokens.
        order_A: the assignment of each sorted row.
        inverse_A: the sorted row of each assignment.
        tokens: the number of tokens.
    """

    routing: Routing
    order_A: Tensor
    inverse_A: Tensor
    tokens: int

    def gates(self) -> Tensor:
        """The gates in the order of the assignments, 0 for those that are dropped."""
        gate_A = self.routing.gate_A
        if self.routing.kept_A is not None:
            gate_A = gate_A * self.routing.kept_A.to(gate_A.dtype)
        return gate_A


def sorted_rows(routing: Routing, tokens: int, experts: int) -> tuple[SortedRows, Tensor]:
    """Sorts all assignments by expert, stably; dropped ones go past the last expert's end.

    Returns:
        The places of the rows, and where each expert's rows end: int32 E.
    """
    expert_A = routing.expert_A
    if routing.kept_A is not None:
        expert_A = expert_A.masked_fill(~routing.kept_A, experts)
    sorted_A, order_A = expert_A.sort(stable=True)
    place_A = torch.arange(len(order_A), device=order_A.device)
    inverse_A = torch.empty_like(order_A).scatter(0, order_A, place_A)
    ends_E = ends_of(sorted_A, experts).to(torch.int32)
    return SortedRows(routing, order_A, inverse_A, tokens), ends_E


def sort_by_expert(
    x_TD: Tensor, routing: Routing, experts: int
) -> tuple[Tensor, Tensor, SortedRows]:
    """Sorts the rows of all assignments by expert, stably; dropped assignments go past the last expert's end.

    Returns:
        x_AD, ends_E (int32) and what `gated_sums` needs.
    """
    rows, ends_E = sorted_rows(routing, x_TD.shape[0], experts)
    if routing.choices:
        x_AD = _Spread.apply(x_TD, rows.order_A, rows.inverse_A, routing.choices)  # type: ignore[no-untyped-call]
    else:
        x_AD = x_TD.index_select(0, routing.token_A.index_select(0, rows.order_A))
    return x_AD, ends_E, rows


def gated_sums(y_AD: Tensor, rows: SortedRows) -> Tensor:
    """Puts rows back in the assignments' order, multiplies them by the gates and adds up each token's: y_TD."""
    routing = rows.routing
    gate_A = rows.gates()
    if routing.choices and compiling.is_eager_on_cpu(y_AD):
        gate_TK = gate_A.view(rows.tokens, routing.choices).to(y_AD.dtype)
        y_TD: Tensor = _GatedSum.apply(y_AD, gate_TK, rows.order_A, rows.inverse_A)  # type: ignore[no-untyped-call]
        return y_TD
    y_AD = _Permute.apply(y_AD, rows.inverse_A, rows.order_A)  # type: ignore[no-untyped-call]
    if routing.choices:
        y_TKD = y_AD.unflatten(0, (rows.tokens, routing.choices))
        gate_TK = gate_A.view(rows.tokens, routing.choices).to(y_AD.dtype)
        return _weighted_sum(gate_TK, y_TKD)
    y_AD = y_AD * gate_A[:, None].to(y_AD.dtype)
    y_TD = y_AD.new_zeros(rows.tokens, y_AD.shape[1])
    return y_TD.index_add(0, routing.token_A, y_AD)
