"""The index of a sharded checkpoint: which tensors it holds, in which parts, in which files.

A sharded checkpoint is a folder. Its tensors are in safetensors files, each of which holds the parts of tensors that
one rank has written; everything else that a checkpoint holds is in one file of plain containers. `index.json` lists the
files with their checksums, and for each tensor the parts with their offsets. It is written last and replaced at once:
a folder without it is no checkpoint, and what it does not list is no part of the checkpoint.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.contracts.errors import UserError
from core.storage.documents import DocumentError, check_regular, read_object
from core.storage.files import is_plain_name, write_text

INDEX = "index.json"
"""Name of the index in the folder of a sharded checkpoint."""

FORMAT = "moeloom-shards-1"
"""What an index says that it is."""

LARGEST_INDEX = 2 * 2**30
"""Bytes of the largest index that is read."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""Number formats by the names that an index has for them."""


@dataclass(frozen=True)
class Part:
    """One part of a tensor in a file.

    Args:
        file: the name of the file, in which the part has the name of its tensor.
        offsets: the place of its first number in the whole tensor.
        shape: its shape.
    """

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(
        self, offsets: Sequence[int], shape: Sequence[int]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """The numbers that the part shares with a box of the tensor: slices of the part, and of the box.

        Args:
            offsets: the place of the box's first number in the whole tensor.
            shape: the shape of the box.

        Returns:
            Both slices; None if the part and the box share no number.
        """
        mine: list[slice] = []
        theirs: list[slice] = []
        for own, length, offset, size in zip(self.offsets, self.shape, offsets, shape, strict=True):
            begin = max(own, offset)
            end = min(own + length, offset + size)
            if begin >= end:
                return None
            mine.append(slice(begin - own, end - own))
            theirs.append(slice(begin - offset, end - offset))
        return tuple(mine), tuple(theirs)


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of a sharded checkpoint: its whole shape, and the parts that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the checksum that a file had when it was written."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "FileRecord":
        """The record of a file with this content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` says.

    Args:
        rest: the name of the file that holds everything but tensors of the model and of the optimizers.
        files: all files by name.
        tensors: all tensors by name.
    """

    rest: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, ShardedTensor]

    def write(self, folder: Path) -> None:
        """Writes the index; from then on the folder is this checkpoint."""
        numbers = {name: number for number, name in enumerate(self.files)}
        tensors = {}
        for name, tensor in self.tensors.items():
            parts = [[numbers[part.file], part.offsets, part.shape] for part in tensor.parts]
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": tensor.shape, "parts": parts}
        files = [[name, record.size, record.sha256] for name, record in self.files.items()]
        document = {"format": FORMAT, "rest": self.rest, "files": files, "tensors": tensors}
        document["sha256"] = _digest_of(document)
        write_text(folder / INDEX, json.dumps(document), durable=True)


def _digest_of(document: Mapping[str, Any]) -> str:
    """The checksum of all other keys of an index."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def is_sharded(checkpoint: Path) -> bool:
    """Whether a path is a whole sharded checkpoint."""
    return checkpoint.is_dir() and (checkpoint / INDEX).is_file()


def read_index(folder: Path) -> ShardIndex:
    """Reads the index of a sharded checkpoint, and checks that its files are there and that parts make up each tensor.

    Raises:
        DocumentError: the index is damaged, or a file is missing or has another size.
    """
    file = folder / INDEX
    document = read_object(file, LARGEST_INDEX)
    if document.get("format") != FORMAT:
        raise DocumentError(file, f"format = {document.get('format')!r}: must be {FORMAT!r}")
    if document.get("sha256") != _digest_of(document):
        raise DocumentError(file, "has changed since it was written: its checksum is another one")
    try:
        names = [str(name) for name, _, _ in document["files"]]
        files = {name: FileRecord(size, digest) for name, size, digest in document["files"]}
        tensors = {name: _tensor_of(value, names) for name, value in document["tensors"].items()}
        index = ShardIndex(document["rest"], files, tensors)
        _check(index)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as cause:
        why = f"{type(cause).__name__}: {cause}"
        raise DocumentError(file, f"is damaged ({' '.join(why.split())[:120]})") from cause
    for name, record in index.files.items():
        path = folder / name
        check_regular(path)
        size = path.stat().st_size
        if size != record.size:
            raise DocumentError(path, f"has {size} bytes, and was written with {record.size}")
    return index


def _tensor_of(value: Mapping[str, Any], names: Sequence[str]) -> ShardedTensor:
    """The tensor that an entry of an index describes."""
    parts: list[Part] = []
    for number, offsets, shape in value["parts"]:
        parts.append(Part(names[number], _sizes(offsets), _sizes(shape)))
    return ShardedTensor(DTYPES[value["dtype"]], _sizes(value["shape"]), tuple(parts))


def _sizes(values: Iterable[Any]) -> tuple[int, ...]:
    """Sizes or offsets, each a whole number that is not negative."""
    found = tuple(values)
    if not all(type(value) is int and value >= 0 for value in found):
        raise ValueError(f"{found}: must be whole numbers")
    return found


def _check(index: ShardIndex) -> None:
    """Raises `ValueError` unless the names are those of files, and the parts of each tensor make up its whole."""
    if index.rest not in index.files:
        raise ValueError(f"rest = {index.rest!r}: must be one of its files")
    for name, record in index.files.items():
        if not is_plain_name(name) or name == INDEX:
            raise ValueError(f"{name!r}: is no name of a file")
        if type(record.size) is not int or not isinstance(record.sha256, str):
            raise ValueError(f"{name}: its size or checksum is missing")
    for name, tensor in index.tensors.items():
        held = 0
        for part in tensor.parts:
            ends = (o + n for o, n in zip(part.offsets, part.shape, strict=True))
            if any(end > size for end, size in zip(ends, tensor.shape, strict=True)):
                raise ValueError(f"{name}: a part lies outside of it")
            held += math.prod(part.shape)
        if len({part.offsets for part in tensor.parts}) < len(tensor.parts):
            raise ValueError(f"{name}: two of its parts begin at one place")
        if held != math.prod(tensor.shape):
            raise ValueError(f"{name}: its parts hold {held} of {math.prod(tensor.shape)} numbers")


def first_changed_file(
    folder: Path, index: ShardIndex, prefix: str = "", *, rank: int = 0, ranks: int = 1
) -> str | None:
    """Compares files of a sharded checkpoint with their checksums; several ranks share the work.

    Args:
        folder: the checkpoint.
        index: its index.
        prefix: only files with tensors whose names begin so are read.
        rank: this rank; it reads every `ranks`-th file.
        ranks: how many ranks share the work.

    Returns:
        The sentence about the first file that has changed; None if there is none.
    """
    names = {
        part.file
        for name, tensor in index.tensors.items()
        if name.startswith(prefix)
        for part in tensor.parts
    }
    for name in sorted(names)[rank::ranks]:
        path = folder / name
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as cause:
            return f"{path}: cannot be read: {cause.strerror}"
        if found != index.files[name].sha256:
            return f"{path}: has changed since it was written: its checksum is another one"
    return None


def files_left_over(folder: Path) -> Iterator[Path]:
    """Yields the files of a sharded checkpoint that its index does not list: a save that did not end left them.

    Raises:
        UserError: the index is damaged.
    """
    listed: set[str] = set()
    if is_sharded(folder):
        listed = {INDEX, *read_index(folder).files}
    for path in sorted(folder.iterdir()):
        is_own = path.suffix in (".safetensors", ".pt", ".tmp")
        if path.name not in listed and is_own and path.is_file():
            yield path


def check_is_whole(folder: Path) -> None:
    """Raises `UserError` for a folder that is in the place of a checkpoint and has no index."""
    if folder.is_dir() and not is_sharded(folder):
        why = f"is no whole checkpoint: {INDEX} is missing, which is written last"
        raise UserError(f"{folder}: {why}")
