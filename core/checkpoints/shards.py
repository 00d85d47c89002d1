"""Reads tensors of a sharded checkpoint, or slices of them, whatever the shards are in which they were written."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.checkpoints.index import (
    INDEX,
    ShardedTensor,
    StoredShard,
    first_changed_file,
    read_index,
)
from core.contracts.errors import UserError
from core.storage.documents import DocumentError

MODEL = "state_dict."
"""How the names of the model's tensors begin in the index."""

OPEN_FILES = 64
"""Files that a reader keeps open."""


def dtype_of(tensor: ShardedTensor) -> torch.dtype:
    """The number format of a tensor."""
    found: torch.dtype = getattr(torch, tensor.dtype)
    return found


class ShardReader:
    """The tensors of a sharded checkpoint.

    Args:
        folder: the checkpoint.

    Attributes:
        index: what its index says.

    Raises:
        DocumentError: the index is damaged, or a file is missing or has another size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self._open = lru_cache(OPEN_FILES)(self._opened)

    def _opened(self, name: str) -> Any:
        return safe_open(str(self.folder / name), framework="pt")

    def check(self, prefix: str = "") -> None:
        """Compares the files with tensors whose names begin so with their checksums.

        Raises:
            UserError: one has changed.
        """
        changed = first_changed_file(self.folder, self.index, prefix)
        if changed:
            raise UserError(changed)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        found = self.index.tensors[name]
        return self.read_slice(name, [0] * len(found.shape), found.shape)

    def read_slice(self, name: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A slice of a tensor, in the format in which it is stored.

        Args:
            name: the tensor's.
            offsets: the place of the slice's first number in the whole tensor.
            shape: the shape of the slice.

        Raises:
            DocumentError: a file does not hold what the index says.
        """
        found = self.index.tensors[name]
        result = torch.empty(tuple(shape), dtype=dtype_of(found))
        for shard in found.shards:
            both = shard.overlap(offsets, shape)
            if both is not None:
                in_shard, in_slice = both
                result[in_slice] = self.read_stored(name, shard, in_shard)
        return result

    def read_stored(self, name: str, shard: StoredShard, place: tuple[slice, ...]) -> Tensor:
        """Some numbers of a stored shard.

        Args:
            name: the tensor's.
            shard: the shard.
            place: which of its numbers, a slice for each axis.

        Raises:
            DocumentError: the file does not hold the shard as the index says.
        """
        file = self.folder / shard.file
        found: ShardedTensor = self.index.tensors[name]
        try:
            opened = self._open(shard.file)
            stored = opened.get_slice(name)
            if tuple(stored.get_shape()) == shard.shape:
                numbers: Tensor = stored[place] if place else opened.get_tensor(name)
                if numbers.dtype == dtype_of(found):
                    return numbers
        except (SafetensorError, OSError) as cause:
            raise DocumentError(file, f"cannot be read: {cause}") from cause
        raise DocumentError(file, f"{name}: its shape or format is not that of {INDEX}")

    def close(self) -> None:
        """Closes the files."""
        self._open.cache_clear()
