"""The index of a sharded checkpoint: which tensors it holds, in which shards, in which files.

A sharded checkpoint is a folder. Its tensors are in safetensors files, each of which holds shards of tensors that one
rank has written; everything else that a checkpoint holds, the rest, is in one file of plain containers. `index.json`
lists the files with their checksums, and for each tensor its shards with their offsets. It is written last and
replaced at once: a folder without it is no checkpoint, and what it does not list is no part of the checkpoint.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.storage.digests import digest_of
from core.storage.documents import DocumentError, check_regular, read_object
from core.storage.files import is_plain_name, write_text

INDEX = "index.json"
"""Name of the index in the folder of a sharded checkpoint."""

FORMAT = "moeloom-shards-1"
"""What an index says that it is."""

LARGEST_INDEX = 2**30
"""Bytes of the largest index that is read; 1,000 tensors on 2,048 ranks take about 60 MB."""

_WRITTEN = re.compile(
    r"rank-\d{5,}-[0-9a-f]{8}-\d{3,}\.safetensors|rest-[0-9a-f]{8}\.pt|\.index\.json\.[0-9a-f]{8}\.tmp"
)
"""The names of the files that a save writes, but for the index."""

BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of a number in each format, by torch's name for it."""


@dataclass(frozen=True)
class StoredShard:
    """A part of a tensor in a file.

    Args:
        file: the name of the file, in which the shard has the name of its tensor.
        offsets: the place of its first number in the whole tensor.
        shape: its shape.
    """

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(
        self, offsets: Sequence[int], shape: Sequence[int]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """The numbers that the shard has in common with a slice of the tensor.

        Args:
            offsets: the place of the slice's first number in the whole tensor.
            shape: the shape of the slice.

        Returns:
            Their place in the shard, and their place in the slice; None if there are none.
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
    """A tensor of a sharded checkpoint: its format by torch's name, its whole shape, and the shards that make it up."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[StoredShard, ...]


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
            shards = [[numbers[one.file], one.offsets, one.shape] for one in tensor.shards]
            tensors[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "shards": shards}
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
    """Reads the index of a sharded checkpoint, and checks that its files are there and that shards make up each tensor.

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
    shards: list[StoredShard] = []
    for number, offsets, shape in value["shards"]:
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r}: must be the number of a file")
        shards.append(StoredShard(names[number], _sizes(offsets), _sizes(shape)))
    if value["dtype"] not in BYTES:
        raise ValueError(f"dtype = {value['dtype']!r}: must be one of {', '.join(BYTES)}")
    return ShardedTensor(value["dtype"], _sizes(value["shape"]), tuple(shards))


def _sizes(values: Iterable[Any]) -> tuple[int, ...]:
    """Sizes or offsets, each a whole number that is not negative."""
    found = tuple(values)
    if not all(type(value) is int and value >= 0 for value in found):
        raise ValueError(f"{found}: must be whole numbers")
    return found


def _check(index: ShardIndex) -> None:
    """Raises `ValueError` for names of no file, and for shards that do not make up a tensor or fit into a file."""
    if index.rest not in index.files:
        raise ValueError(f"rest = {index.rest!r}: must be one of its files")
    for name, record in index.files.items():
        if not is_plain_name(name) or name == INDEX:
            raise ValueError(f"{name!r}: is no name of a file")
        if type(record.size) is not int or not isinstance(record.sha256, str):
            raise ValueError(f"{name}: its size or checksum is missing")
    needed = dict.fromkeys(index.files, 0)
    for name, tensor in index.tensors.items():
        _check_shards(name, tensor)
        for shard in tensor.shards:
            needed[shard.file] += math.prod(shard.shape) * BYTES[tensor.dtype]
    for name, size in needed.items():
        if size > index.files[name].size:
            raise ValueError(f"{name}: has {index.files[name].size} bytes, and {size} of tensors")


def _check_shards(name: str, tensor: ShardedTensor) -> None:
    """Raises `ValueError` unless the shards of a tensor are a grid: intervals that make up the length of each axis."""
    intervals: list[set[tuple[int, int]]] = [set() for _ in tensor.shape]
    for shard in tensor.shards:
        for axis, place in enumerate(zip(shard.offsets, shard.shape, strict=True)):
            intervals[axis].add(place)
    for length, places in zip(tensor.shape, intervals, strict=True):
        end = 0
        for begin, size in sorted(places):
            end = end + size if begin == end else -1
        if end != length and not (length == 0 and not places):
            raise ValueError(f"{name}: its shards do not make up the whole")
    distinct = {shard.offsets for shard in tensor.shards}
    expected = math.prod(len(places) for places in intervals) if math.prod(tensor.shape) else 0
    if len(tensor.shards) != expected or len(distinct) != expected:
        raise ValueError(f"{name}: its shards do not make up the whole")


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
        shard.file
        for name, tensor in index.tensors.items()
        if name.startswith(prefix)
        for shard in tensor.shards
    }
    for name in sorted(names)[rank::ranks]:
        changed = change_of(folder, index, name)
        if changed:
            return changed
    return None


def change_of(folder: Path, index: ShardIndex, name: str) -> str | None:
    """The sentence about a file that is not the one that was written; None if it is."""
    path = folder / name
    try:
        found = digest_of(path)
    except OSError as cause:
        return f"{path}: cannot be read: {cause.strerror}"
    if found != index.files[name].sha256:
        return f"{path}: has changed since it was written: its checksum is another one"
    return None


def files_left_over(folder: Path) -> Iterator[Path]:
    """Yields files that saves have written into a folder and its index does not list: one that did not end left them.

    Files with other names are not ours. Nothing is left over where the index is damaged: what it listed is not known.
    """
    listed: set[str] = set()
    if is_sharded(folder):
        try:
            listed = {INDEX, *read_index(folder).files}
        except UserError:
            return
    for path in sorted(folder.iterdir()):
        is_own = _WRITTEN.fullmatch(path.name) is not None
        if path.name not in listed and is_own and path.is_file() and not path.is_symlink():
            yield path
