"""Copies of rows and sums over copies: each is the gradient of the other, and neither needs atomic additions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Copies:
    """Which row each copy is of. P rows, C copies, at most J of one row.

    Args:
        row_C: int64, the row of each copy.
        copy_PJ: int64, the copies of each row in their order; -1 where a row has fewer.
    """

    row_C: Tensor
    copy_PJ: Tensor

    @classmethod
    def of(cls, row_C: Tensor, rows: int, most: int) -> "Copies":
        """Finds the copies of each row.

        Args:
            row_C: the row of each copy.
            rows: how many rows there are.
            most: no row has more copies.
        """
        sorted_C, order_C = row_C.sort(stable=True)
        first_C = torch.searchsorted(sorted_C, sorted_C)
        number_C = torch.arange(len(row_C), device=row_C.device) - first_C
        empty = row_C.new_full((rows * most,), -1)
        copy_PJ = empty.scatter(0, sorted_C * most + number_C, order_C).view(rows, most)
        return cls(row_C, copy_PJ)


def _sums(y_CD: Tensor, copy_PJ: Tensor, gate_C: Tensor | None = None) -> Tensor:
    """The sum of each row's copies, weighted by gates if there are any; added up in fp32 or wider."""
    wide = torch.promote_types(y_CD.dtype, torch.float32)
    if gate_C is not None:
        wide = torch.promote_types(wide, gate_C.dtype)
    sum_PD = y_CD.new_zeros(len(copy_PJ), y_CD.shape[1], dtype=wide)
    for copy_P in copy_PJ.unbind(1):
        at_P = copy_P.clamp(min=0)
        y_PD = y_CD.index_select(0, at_P).to(wide)
        if gate_C is not None:
            y_PD = y_PD * gate_C.index_select(0, at_P)[:, None]
        sum_PD += y_PD.masked_fill_((copy_P < 0)[:, None], 0)
    return sum_PD.to(y_CD.dtype)


class _Copy(torch.autograd.Function):
    """A copy of its row for each copy; a row's gradient is the sum of its copies'."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, row_C: Tensor, copy_PJ: Tensor) -> Tensor:
        ctx.save_for_backward(copy_PJ)
        return x_PD.index_select(0, row_C)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_CD: Tensor) -> tuple[Tensor, None, None]:
        (copy_PJ,) = ctx.saved_tensors
        return _sums(dy_CD, copy_PJ), None, None


class _Sum(torch.autograd.Function):
    """The sum of each row's copies; a copy's gradient is its row's."""

    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, row_C: Tensor, copy_PJ: Tensor) -> Tensor:
        ctx.save_for_backward(row_C)
        return _sums(y_CD, copy_PJ)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dx_PD: Tensor) -> tuple[Tensor, None, None]:
        (row_C,) = ctx.saved_tensors
        return dx_PD.index_select(0, row_C), None, None


class _GatedSum(torch.autograd.Function):
    """The sum of each row's copies, each times its gate."""

    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, gate_C: Tensor, row_C: Tensor, copy_PJ: Tensor) -> Tensor:
        ctx.save_for_backward(y_CD, gate_C, row_C)
        return _sums(y_CD, copy_PJ, gate_C)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dx_PD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_CD, gate_C, row_C = ctx.saved_tensors
        wide = torch.promote_types(torch.promote_types(y_CD.dtype, gate_C.dtype), torch.float32)
        dx_CD = dx_PD.index_select(0, row_C).to(wide)
        dgate_C = (dx_CD * y_CD).sum(dim=1).to(gate_C.dtype)
        dy_CD = (dx_CD * gate_C[:, None]).to(y_CD.dtype)
        return dy_CD, dgate_C, None, None


def copy_rows(x_PD: Tensor, copies: Copies) -> Tensor:
    """Copies rows: x_CD."""
    x_CD: Tensor = _Copy.apply(x_PD, copies.row_C, copies.copy_PJ)  # type: ignore[no-untyped-call]
    return x_CD


def sum_copies(y_CD: Tensor, copies: Copies) -> Tensor:
    """Adds up the copies of each row: y_PD, 0 for a row without any."""
    y_PD: Tensor = _Sum.apply(y_CD, copies.row_C, copies.copy_PJ)  # type: ignore[no-untyped-call]
    return y_PD


def sum_gated_copies(y_CD: Tensor, gate_C: Tensor, copies: Copies) -> Tensor:
    """Adds up the copies of each row, each times its gate: y_PD in the format of y_CD."""
    y_PD: Tensor = _GatedSum.apply(  # type: ignore[no-untyped-call]
        y_CD, gate_C, copies.row_C, copies.copy_PJ
    )
    return y_PD
