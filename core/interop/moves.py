"""What is done with one tensor: copy its rows, quantise them, or compare them with another's.

A move names its source and its target and holds nothing; together with two stores it is the whole conversion of one
tensor, and doing it twice is doing it once, which is what resuming relies on.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.contracts.errors import UserError
from core.interop.tensors import BLOCK, CODES, SCALE, Kind, Tensors, chunks, quantised


class Target(Protocol):
    """Where rows go."""

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Put rows in their place."""

    def sync(self) -> None:
        """Force what was written to the disk."""


@dataclass(frozen=True)
class Copy:
    """Rows of one tensor become rows of another: target row first + i is source row begin + order[i].

    Args:
        source, target: names.
        begin, first: where the rows start in each.
        kind: of the rows in the source.
        dtype: in the target.
        order: None: as they stand. Otherwise the whole piece is held in memory.
    """

    source: str
    target: str
    begin: int
    first: int
    kind: Kind
    dtype: torch.dtype
    order: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Bytes that are read."""
        return self.kind.bytes

    def run(self, source: Tensors, target: Target) -> None:
        """Move the rows."""
        if self.order is not None:
            rows = source.values(self.source, self.begin, self.begin + self.kind.rows, self.dtype)
            target.write(self.target, self.first, _taken(rows, self.order))
            return
        for low, high in chunks(self.kind, 0, self.kind.rows):
            rows = source.values(self.source, self.begin + low, self.begin + high, self.dtype)
            target.write(self.target, self.first + low, rows)


@dataclass(frozen=True)
class Quantise:
    """Rows of ours become a matrix of theirs in FP8 blocks, with its scales."""

    source: str
    target: str
    begin: int
    kind: Kind
    order: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Bytes that are read."""
        return self.kind.bytes

    def run(self, source: Tensors, target: Target) -> None:
        """Whole blocks at a time.

        Raises:
            UserError: a number that is not finite.
        """
        count = self.kind.rows
        for low, high in [(0, count)] if self.order is not None else chunks(self.kind, 0, count, BLOCK):
            rows = source.values(self.source, self.begin + low, self.begin + high, torch.float32)
            if not rows.isfinite().all():
                raise UserError(f"tensor {self.source} holds numbers that are not finite: FP8 blocks cannot")
            codes, scales = quantised(rows if self.order is None else _taken(rows, self.order))
            target.write(self.target, low, codes)
            target.write(self.target + SCALE, low, scales)


@dataclass(frozen=True)
class Compare:
    """A tensor of theirs must hold the numbers of another one."""

    source: str
    owner: str
    kind: Kind
    where: str

    @property
    def bytes(self) -> int:
        """Bytes that are read."""
        return 2 * self.kind.bytes

    def run(self, source: Tensors, target: Target) -> None:
        """Compare.

        Raises:
            UserError: they differ.
        """
        for low, high in chunks(self.kind, 0, self.kind.rows):
            dtype = torch.promote_types(source.kinds[self.source].dtype, source.kinds[self.owner].dtype)
            ours, theirs = (source.values(name, low, high, dtype) for name in (self.owner, self.source))
            if not torch.equal(ours, theirs):
                raise UserError(f"{self.where}: tensor {self.source} must be a copy of {self.owner}, and differs")


Move = Copy | Quantise | Compare


def inverse(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The order that undoes another."""
    if order is None:
        return None
    back = [0] * len(order)
    for place, row in enumerate(order):
        back[row] = place
    return tuple(back)


def _taken(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """Rows in another order; codes go as the bytes they are, because not every backend sorts them."""
    index = torch.tensor(order)
    return rows.view(torch.uint8)[index].view(CODES) if rows.dtype == CODES else rows[index]
