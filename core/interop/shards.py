"""Reading safetensors files: headers are read and checked at once, rows of tensors when they are needed.

A file holds eight bytes with the length of the header, a JSON header that gives the format, shape and offsets of each
tensor, and then the tensors without gaps. Rows are read with `pread` into new memory, because a mapped file would
count everything that was ever read as memory of the process.
"""

import math
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.contracts.errors import UserError
from core.interop.source_folder import check_inside
from core.interop.tensors import TensorReader, TensorSpec
from core.storage.documents import check_regular, parse_object, read_object
from core.storage.files import is_plain_name
from core.training.run_folder import WEIGHTS_INDEX

FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000
OPEN_FILES = 64
ADAPTER = "adapter_"
"""What the names of files begin with that hold an adapter (PEFT), which a model is used with and can be without."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Shards(TensorReader):
    """The tensors of some safetensors files.

    Args:
        files: only the header of each is read at first.

    Raises:
        UserError: a file cannot be read, is truncated or is not a safetensors file, or a tensor is in two files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files: dict[str, Path] = {}
        self._begin: dict[str, int] = {}
        self._open: OrderedDict[Path, int] = OrderedDict()
        specs: dict[str, TensorSpec] = {}
        for file in files:
            for name, (spec, begin) in read_header(file).items():
                if name in self.files:
                    raise UserError(f"{file}: tensor {name} is in {self.files[name].name} too")
                self.files[name] = file
                self._begin[name] = begin
                specs[name] = spec
        self.specs = specs

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Returns the rows from `begin` to `end`, in new memory."""
        spec = self.specs[name]
        size = (end - begin) * spec.row_bytes
        if size == 0:
            return torch.empty((end - begin, spec.width), dtype=spec.dtype)
        buffer = bytearray(size)
        view = memoryview(buffer)
        at = self._begin[name] + begin * spec.row_bytes
        while view:
            got = os.preadv(self._descriptor(self.files[name]), [view], at)
            if not got:
                raise UserError(f"{self.files[name]}: became shorter while it was read")
            view = view[got:]
            at = at + got
        return torch.frombuffer(buffer, dtype=spec.dtype).view(end - begin, spec.width)

    def _descriptor(self, file: Path) -> int:
        """Returns a descriptor of a file; at most `OPEN_FILES` stay open, because a checkpoint may have hundreds."""
        if file not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(file, os.O_RDONLY)
        self._open.move_to_end(file)
        return self._open[file]

    def close(self) -> None:
        """Closes the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


def read_header(file: Path) -> dict[str, tuple[TensorSpec, int]]:
    """Returns each tensor's specification and the byte of the file at which it begins, by name.

    Raises:
        UserError: the file cannot be read, is truncated, or is not a safetensors file.
    """
    check_regular(file)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > min(size - 8, LARGEST_HEADER):
                raise UserError(
                    f"{file}: is truncated, or no safetensors file: its header does not fit into {size} bytes"
                )
            written = stream.read(length)
    except OSError as cause:
        raise UserError(f"{file}: cannot be read: {cause.strerror}") from cause
    header = parse_object(written, file, "no safetensors file: its header")
    header.pop("__metadata__", None)
    places = {name: _place(file, name, entry) for name, entry in header.items()}
    _check_extent(file, places, size - 8 - length)
    return {name: (spec, 8 + length + begin) for name, (spec, begin) in places.items()}


def _place(file: Path, name: str, entry: Any) -> tuple[TensorSpec, int]:
    """Returns a tensor's specification, and the byte after the header at which it begins."""
    try:
        written = entry["dtype"]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
        whole = isinstance(written, str) and all(type(n) is int and n >= 0 for n in numbers)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{file}: tensor {name}: its entry in the header is damaged")
    if written not in FORMATS:
        raise UserError(
            f"{file}: tensor {name} has the format {written}; known: {', '.join(FORMATS)}"
        )
    spec = TensorSpec(FORMATS[written], shape)
    if end - begin != math.prod(shape) * spec.dtype.itemsize:
        raise UserError(
            f"{file}: tensor {name}: {end - begin} bytes do not hold a {written} of shape {list(shape)}"
        )
    return spec, begin


def _check_extent(file: Path, places: dict[str, tuple[TensorSpec, int]], size: int) -> None:
    """Raises `UserError` unless the tensors fill the `size` bytes after the header without gaps."""
    in_order = sorted(places.items(), key=lambda item: (item[1][1], item[1][0].bytes))
    expected = 0
    for name, (spec, begin) in in_order:
        if begin != expected:
            raise UserError(
                f"{file}: tensor {name} does not begin where the one before it ends: the header is damaged"
            )
        expected = begin + spec.bytes
    if size < expected:
        raise UserError(f"{file}: is truncated: {expected - size} bytes of its tensors are missing")
    if size > expected:
        raise UserError(
            f"{file}: {size - expected} bytes after its last tensor belong to no tensor"
        )


def shards_of(
    folder: Path, index: str = WEIGHTS_INDEX, say: Callable[[str], None] | None = None
) -> Shards:
    """Returns the tensors of a folder: those of its index, or those of its one file.

    Args:
        folder: the folder.
        index: the name of its index.
        say: called with a note on each file of an adapter, which is left out; None: such a file is an error.

    Raises:
        UserError: a file is a link to a place outside, there are no safetensors (pickled weights are never read), or
            files and index contradict each other.
    """
    files: list[Path] = []
    for file in sorted(folder.glob("*.safetensors")):
        if say is not None and file.name.startswith(ADAPTER):
            say(f"note: {file} is left out: an adapter is no part of the model's weights")
        else:
            files.append(check_inside(file))
    written = check_inside(folder / index)
    if not written.exists():
        if len(files) == 1:
            return Shards(files)
        raise UserError(_without_index(folder, index, len(files)))
    weight_map = _weight_map(written)
    for name, listed in weight_map.items():
        if not (folder / listed).is_file():
            raise UserError(
                f"{written}: lists {listed} for tensor {name}, but {listed} does not exist"
            )
    for file in files:
        if file.name not in weight_map.values():
            raise UserError(f"{written}: {file.name} is not in this index, and is in its folder")
    shards = Shards(folder / listed for listed in dict.fromkeys(weight_map.values()))
    for name, listed in weight_map.items():
        if name not in shards.files or shards.files[name].name != listed:
            raise UserError(f"{written}: tensor {name} should be in {listed}, and is not there")
    for name in shards.files:
        if name not in weight_map:
            raise UserError(
                f"{written}: tensor {name} of {shards.files[name].name} is not in this index"
            )
    return shards


def _without_index(folder: Path, index: str, count: int) -> str:
    """The error message for a folder without an index that holds `count` safetensors files."""
    if count:
        return (
            f"{folder}: holds {count} safetensors files and no {index}, which lists their tensors"
        )
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLED:
            return (
                f"{folder}: only pickled weights ({file.name}); they can run code, "
                "so only safetensors are read"
            )
    return f"{folder}: no weights here: neither {index} nor a .safetensors file"


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the file of each tensor, by name, as an index gives it."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_file_name, weight_map.values())):
        raise UserError(
            f"{index}: weight_map must give the name of a .safetensors file beside it for every tensor"
        )
    return weight_map


def is_file_name(value: Any) -> bool:
    """Returns whether a value is the name of a safetensors file, without a folder."""
    return is_plain_name(value) and str(value).endswith(".safetensors")
