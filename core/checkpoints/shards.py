"""Reads tensors of a sharded checkpoint: any box of them, whatever the parts are in which they were written."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.checkpoints.index import INDEX, Part, ShardedTensor, first_changed_file, read_index
from core.contracts.errors import UserError
from core.storage.documents import DocumentError

MODEL = "state_dict."
"""How the names of the model's tensors begin in the index."""

OPEN_FILES = 64
"""Files that a reader keeps open."""


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
        return self.box(name, [0] * len(found.shape), found.shape)

    def box(self, name: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box of a tensor, in the format in which it is stored.

        Args:
            name: the tensor's.
            offsets: the place of the box's first number in the whole tensor.
            shape: the shape of the box.

        Raises:
            DocumentError: a file does not hold what the index says.
        """
        found = self.index.tensors[name]
        box = torch.empty(tuple(shape), dtype=found.dtype)
        held = 0
        for part in found.parts:
            both = part.overlap(offsets, shape)
            if both is not None:
                box[both[1]] = self.piece(name, part, both[0])
                held += math.prod(s.stop - s.start for s in both[1])
        if held != box.numel():
            raise DocumentError(self.folder / INDEX, f"{name}: its parts do not make up the whole")
        return box

    def piece(self, name: str, part: Part, piece: tuple[slice, ...]) -> Tensor:
        """Numbers of one part.

        Args:
            name: the tensor's.
            part: the part.
            piece: which of its numbers, a slice for each axis.

        Raises:
            DocumentError: the file does not hold the part as the index says.
        """
        file = self.folder / part.file
        found: ShardedTensor = self.index.tensors[name]
        try:
            stored = self._open(part.file).get_slice(name)
            if tuple(stored.get_shape()) == part.shape:
                numbers: Tensor = stored[piece] if piece else self._open(part.file).get_tensor(name)
                if numbers.dtype == found.dtype:
                    return numbers
        except (SafetensorError, OSError) as cause:
            raise DocumentError(file, f"cannot be read: {cause}") from cause
        raise DocumentError(file, f"{name}: its shape or format is not that of {INDEX}")

    def close(self) -> None:
        """Closes the files."""
        self._open.cache_clear()
