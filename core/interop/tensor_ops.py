"""Operations on one tensor: copy its rows, quantise them, or compare them with those of another tensor.

An operation holds the names of its source and its target, and no numbers. It can be repeated without changing the
result, so a conversion that was stopped may repeat the operations whose end was not recorded.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.contracts.errors import UserError
from core.interop.tensors import BLOCK, CODES, SCALE, TensorReader, TensorSpec, chunks, quantised


class Target(Protocol):
    """A store that rows of tensors are written to."""

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Writes rows of a tensor, the first of them at row `first`."""

    def sync(self) -> None:
        """Flushes what was written to the disk."""


@dataclass(frozen=True)
class Copy:
    """Copies rows of one tensor into another: target row first + i is source row begin + order[i].

    Args:
        source, target: names of the tensors.
        begin, first: the first row in the source, and in the target.
        spec: number format and shape of the rows in the source.
        dtype: number format in the target.
        order: None: the rows keep their order. Otherwise all of them are held in memory at once.
    """

    source: str
    target: str
    begin: int
    first: int
    spec: TensorSpec
    dtype: torch.dtype
    order: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Number of bytes that are read."""
        return self.spec.bytes

    def run(self, source: TensorReader, target: Target) -> None:
        """Copies the rows."""
        if self.order is not None:
            rows = source.values(self.source, self.begin, self.begin + self.spec.rows, self.dtype)
            target.write(self.target, self.first, _reordered(rows, self.order))
            return
        for low, high in chunks(self.spec, 0, self.spec.rows):
            rows = source.values(self.source, self.begin + low, self.begin + high, self.dtype)
            target.write(self.target, self.first + low, rows)


@dataclass(frozen=True)
class Quantise:
    """Quantises rows of our tensor to a matrix of the checkpoint in FP8 blocks, with its scales."""

    source: str
    target: str
    begin: int
    spec: TensorSpec
    order: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Number of bytes that are read."""
        return self.spec.bytes

    def run(self, source: TensorReader, target: Target) -> None:
        """Quantises whole blocks at a time.

        Raises:
            UserError: a number is not finite.
        """
        ranges = chunks(self.spec, 0, self.spec.rows, BLOCK)
        if self.order is not None:
            ranges = iter([(0, self.spec.rows)])
        for low, high in ranges:
            rows = source.values(self.source, self.begin + low, self.begin + high, torch.float32)
            if not rows.isfinite().all():
                raise UserError(
                    f"tensor {self.source} holds a number that is not finite, which FP8 blocks cannot hold; "
                    "leave out --fp8"
                )
            if self.order is not None:
                rows = _reordered(rows, self.order)
            codes, scales = quantised(rows)
            target.write(self.target, low, codes)
            target.write(self.target + SCALE, low, scales)


@dataclass(frozen=True)
class Compare:
    """Checks that a tensor of the checkpoint holds the same numbers as another one."""

    source: str
    owner: str
    spec: TensorSpec
    where: str

    @property
    def bytes(self) -> int:
        """Number of bytes that are read."""
        return 2 * self.spec.bytes

    def run(self, source: TensorReader, target: Target) -> None:
        """Compares the tensors.

        Raises:
            UserError: they differ.
        """
        specs = source.specs
        dtype = torch.promote_types(specs[self.source].dtype, specs[self.owner].dtype)
        for low, high in chunks(self.spec, 0, self.spec.rows):
            original = source.values(self.owner, low, high, dtype)
            copy = source.values(self.source, low, high, dtype)
            if not _same(original, copy):
                raise UserError(
                    f"{self.where}: tensor {self.source} must be a copy of {self.owner}, and differs"
                )


TensorOp = Copy | Quantise | Compare


def inverse(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Returns the order that undoes another."""
    if order is None:
        return None
    back = [0] * len(order)
    for place, row in enumerate(order):
        back[row] = place
    return tuple(back)


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same numbers; a NaN is equal to one with the same bits."""
    if torch.equal(one, two):
        return True
    if one.shape != two.shape:
        return False
    equal_bits = one.contiguous().view(torch.uint8) == two.contiguous().view(torch.uint8)
    return bool(((one == two) | equal_bits.unflatten(-1, (-1, one.itemsize)).all(-1)).all())


def _reordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """Returns rows in another order; FP8 codes are indexed as bytes, because not every backend can index FP8."""
    index = torch.tensor(order)
    if rows.dtype == CODES:
        return rows.view(torch.uint8)[index].view(CODES)
    return rows[index]
