"""Exchanges between the ranks of a process group: integers at once, rows in a transfer that other work may overlap.

Integers travel through the operators `moeloom::exchange_counts` and `moeloom::exchange_integers`. A block that is
recomputed keeps the results of these operators, as it keeps the chosen experts: ranks exchange them once, and the
recomputed rows are cut at the same places.

Rows travel by `start_transfer` and `finish_transfer`. Both can be differentiated: in the backward pass the gradient
of `finish_transfer` starts the way back and that of `start_transfer` waits for it, so the gradients of what was
computed between the two are computed while rows travel. Every rank must call all of this in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import distributed_c10d
from torch.profiler import record_function


def _group(name: str) -> dist.ProcessGroup:
    """The process group of a name: the arguments of operators are tensors, numbers and texts."""
    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return group


@torch.library.custom_op("moeloom::exchange_counts", mutates_args=())
def exchange_counts(counts_RX: Tensor, group: str) -> Tensor:
    """Sends row r of integers to rank r of a process group.

    Args:
        counts_RX: int64, a row for each rank.
        group: the name of the process group.

    Returns:
        A tensor of the same shape: row r is what rank r sent to this rank.
    """
    received_RX = torch.empty_like(counts_RX)
    dist.all_to_all_single(received_RX, counts_RX.contiguous(), group=_group(group))
    return received_RX


@exchange_counts.register_fake
def _(counts_RX: Tensor, group: str) -> Tensor:
    return torch.empty_like(counts_RX)


@torch.library.custom_op("moeloom::exchange_integers", mutates_args=())
def exchange_integers(
    values_A: Tensor, sent: Sequence[int], received: Sequence[int], group: str
) -> Tensor:
    """Sends pieces of a list of integers to the ranks of a process group.

    Args:
        values_A: int64, the pieces one after the other in the order of the ranks.
        sent: how many entries go to each rank.
        received: how many come from each rank.
        group: the name of the process group.

    Returns:
        The received pieces, in the order of the ranks.
    """
    result = values_A.new_empty(sum(received))
    dist.all_to_all_single(
        result,
        values_A.contiguous(),
        list(received),
        list(sent),
        group=_group(group),
    )
    return result


@exchange_integers.register_fake
def _(values_A: Tensor, sent: Sequence[int], received: Sequence[int], group: str) -> Tensor:
    return values_A.new_empty(sum(received))


OPERATORS = (
    torch.ops.moeloom.exchange_counts.default,
    torch.ops.moeloom.exchange_integers.default,
)
"""The operators whose results a recomputed block keeps."""


@dataclass(frozen=True)
class Splits:
    """How many rows go to each rank of a group, and how many come from each."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    def reversed(self) -> "Splits":
        """The way back: what was received is sent."""
        return Splits(self.received, self.sent)


@dataclass
class Transfer:
    """One transfer of some tensors between ranks; its buffers are kept until it has ended.

    Args:
        name: its name in profiles.
        group: the process group.
        splits: how each tensor's rows are divided.
    """

    name: str
    group: dist.ProcessGroup
    splits: tuple[Splits, ...]
    _under_way: list[tuple[Any, Tensor, Tensor]] = field(default_factory=list, init=False)

    def launch(self, tensors: Sequence[Tensor], *, backward: bool = False) -> None:
        """Starts to send the tensors, in the backward pass the other way."""
        with record_function(self.name):
            for tensor, splits in zip(tensors, self.splits, strict=True):
                if backward:
                    splits = splits.reversed()
                sent = tensor.contiguous()
                result = sent.new_empty(sum(splits.received), *sent.shape[1:])
                work = dist.all_to_all_single(
                    result,
                    sent,
                    list(splits.received),
                    list(splits.sent),
                    group=self.group,
                    async_op=True,
                )
                self._under_way.append((work, sent, result))

    def finish(self) -> list[Tensor]:
        """Waits until the tensors have arrived and returns them."""
        results = []
        with record_function(self.name):
            for work, _, result in self._under_way:
                work.wait()
                results.append(result)
        self._under_way = []
        return results


class _Start(torch.autograd.Function):
    """Launches a transfer and returns a scalar that only links it to `_Finish` in the graph."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, *tensors: Tensor) -> Tensor:
        ctx.transfer = transfer
        transfer.launch(tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.transfer.finish())


class _Finish(torch.autograd.Function):
    """Waits for the transfer that `_Start` launched."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, link: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        ctx.link = (link.dtype, link.device)
        return tuple(transfer.finish())

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        ctx.transfer.launch(gradients, backward=True)
        dtype, device = ctx.link
        return None, torch.zeros((), dtype=dtype, device=device)


def start_transfer(transfer: Transfer, *tensors: Tensor) -> Tensor:
    """Starts a transfer of floating-point tensors.

    Args:
        transfer: describes it; a new one for each call.
        tensors: rows in the order of the ranks that they go to, one tensor for each of the transfer's splits.

    Returns:
        A scalar without a meaning of its own, for `finish_transfer`.
    """
    link: Tensor = _Start.apply(transfer, *tensors)  # type: ignore[no-untyped-call]
    return link


def finish_transfer(transfer: Transfer, link: Tensor) -> tuple[Tensor, ...]:
    """Waits for a transfer and returns the received tensors, their rows in the order of the ranks they come from.

    Args:
        transfer: the one that was given to `start_transfer`.
        link: what `start_transfer` returned.
    """
    tensors: tuple[Tensor, ...] = _Finish.apply(transfer, link)  # type: ignore[no-untyped-call]
    return tensors
