"""Rows of the model's tensors in a sharded checkpoint, none of which is put together as a whole."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoints.averages import averages_in_index, index_prefix, missing_average
from core.checkpoints.reading import open_shards
from core.checkpoints.shards import MODEL, ShardReader, dtype_of
from core.interop.tensors import TensorReader, TensorSpec

PREFIX = f"{MODEL}model."
"""How the names of the language model's tensors begin; in the rest of the state are metrics of the run."""


class ShardRows(TensorReader):
    """The model's tensors of a sharded checkpoint, whose files are compared with their checksums first.

    Args:
        checkpoint: its folder.
        average: takes these averaged weights in place of those that were trained; None: these.

    Raises:
        UserError: it is damaged, or holds no such average.
    """

    def __init__(self, checkpoint: Path, average: str | None = None) -> None:
        self._reader = open_shards(checkpoint)
        self._reader.check(MODEL)
        specs = specs_of(self._reader)
        self._stored = {name: f"{PREFIX}{name}" for name in specs}
        if average is not None:
            self._take_average(average, specs)
        self.specs = specs

    def _take_average(self, average: str, specs: dict[str, TensorSpec]) -> None:
        """Reads averaged weights wherever there are any, and replaces their specifications."""
        index = self._reader.index
        known = averages_in_index(index)
        if average not in known:
            raise missing_average(average, self._reader.folder, known)
        prefix = index_prefix(average)
        self._reader.check(prefix)
        for name in specs:
            stored = f"{prefix}{PREFIX.removeprefix(MODEL)}{name}"
            if stored in index.tensors:
                tensor = index.tensors[stored]
                specs[name] = TensorSpec(dtype_of(tensor), tensor.shape)
                self._stored[name] = stored

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Reads the rows, whatever the parts are that hold them."""
        spec = self.specs[name]
        rows = [torch.empty(0, spec.width, dtype=spec.dtype)]
        for offsets, shape in _slices(spec.shape, begin, end):
            numbers = self._reader.read_slice(self._stored[name], offsets, shape)
            rows.append(numbers.reshape(-1, spec.width))
        return torch.cat(rows)


def specs_of(reader: ShardReader) -> dict[str, TensorSpec]:
    """The number formats and shapes of the model's tensors in a sharded checkpoint."""
    specs: dict[str, TensorSpec] = {}
    for name, tensor in reader.index.tensors.items():
        if name.startswith(PREFIX):
            specs[name.removeprefix(PREFIX)] = TensorSpec(dtype_of(tensor), tensor.shape)
    return specs


def _slices(
    shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields the offsets and the shapes of slices that together are the rows from `begin` to `end` of a tensor."""
    if len(shape) < 2:
        if end > begin:
            yield (0,) * len(shape), shape
        return
    if len(shape) == 2:
        yield (begin, 0), (end - begin, shape[1])
        return
    inner = math.prod(shape[1:-1])
    while begin < end:
        number, first = divmod(begin, inner)
        stop = min(inner, first + end - begin)
        for offsets, lengths in _slices(shape[1:], first, stop):
            yield (number, *offsets), (1, *lengths)
        begin += stop - first
