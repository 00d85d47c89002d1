"""Reading safetensors files: their headers at once and checked, their rows when asked for.

The file: eight bytes with the header's length, a JSON header that gives each tensor's format, shape and place, then
the tensors without gaps. Rows are read with `pread` into memory of their own; a mapped file would count all that was
ever read as the process's memory.
"""

import json
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.contracts.errors import UserError
from core.interop.tensors import Kind, Tensors
from core.training.folder import WEIGHTS_INDEX

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


class Shards(Tensors):
    """The tensors of some safetensors files.

    Args:
        files: each is read as far as its header.

    Raises:
        UserError: a file that cannot be read, is truncated or no safetensors file, or a tensor that stands in two.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files: dict[str, Path] = {}
        self._begin: dict[str, int] = {}
        self._open: OrderedDict[Path, int] = OrderedDict()
        kinds: dict[str, Kind] = {}
        for file in files:
            for name, (kind, begin) in read_header(file).items():
                if name in self.files:
                    raise UserError(f"{file}: tensor {name} stands in {self.files[name].name} too")
                self.files[name], self._begin[name], kinds[name] = file, begin, kind
        self.kinds = kinds

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows begin to end, in memory of their own."""
        kind = self.kinds[name]
        size = (end - begin) * kind.row_bytes
        if size == 0:
            return torch.empty((end - begin, kind.width), dtype=kind.dtype)
        buffer = bytearray(size)
        view, at = memoryview(buffer), self._begin[name] + begin * kind.row_bytes
        while view:
            got = os.preadv(self._descriptor(self.files[name]), [view], at)
            if not got:
                raise UserError(f"{self.files[name]}: became shorter while it was read")
            view, at = view[got:], at + got
        return torch.frombuffer(buffer, dtype=kind.dtype).view(end - begin, kind.width)

    def _descriptor(self, file: Path) -> int:
        """Files stay open while they are in use: a checkpoint has hundreds."""
        if file not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(file, os.O_RDONLY)
        self._open.move_to_end(file)
        return self._open[file]

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


def read_header(file: Path) -> dict[str, tuple[Kind, int]]:
    """Every tensor of a file: what it is and at which byte it begins.

    Raises:
        UserError: the file cannot be read, is truncated, or is none.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = struct.unpack("<Q", head)[0] if len(head := stream.read(8)) == 8 else size
            if length > min(size - 8, LARGEST_HEADER):
                raise UserError(
                    f"{file}: is truncated, or no safetensors file: its header does not fit into {size} bytes"
                )
            header = json.loads(stream.read(length))
    except OSError as cause:
        raise UserError(f"{file}: cannot be read: {cause.strerror}") from cause
    except ValueError as cause:
        raise UserError(f"{file}: no safetensors file: its header is not JSON") from cause
    if not isinstance(header, dict):
        raise UserError(f"{file}: no safetensors file: its header is no section")
    header.pop("__metadata__", None)
    places = {name: _place(file, name, entry) for name, entry in header.items()}
    _check_extent(file, places, size - 8 - length)
    return {name: (kind, 8 + length + begin) for name, (kind, begin) in places.items()}


def _place(file: Path, name: str, entry: Any) -> tuple[Kind, int]:
    """A tensor's kind, and where it begins after the header."""
    try:
        written, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{file}: tensor {name}: its entry in the header is damaged")
    if written not in FORMATS:
        raise UserError(f"{file}: tensor {name} has the format {written}; known: {', '.join(FORMATS)}")
    kind = Kind(FORMATS[written], shape)
    if end - begin != math.prod(shape) * kind.dtype.itemsize:
        raise UserError(f"{file}: tensor {name}: {end - begin} bytes do not hold a {written} of shape {list(shape)}")
    return kind, begin


def _check_extent(file: Path, places: dict[str, tuple[Kind, int]], size: int) -> None:
    """The tensors fill the rest of the file, one after the other."""
    expected = 0
    for name, (kind, begin) in sorted(places.items(), key=lambda item: (item[1][1], item[1][0].bytes)):
        if begin != expected:
            raise UserError(f"{file}: tensor {name} does not begin where the one before it ends: the header is damaged")
        expected = begin + kind.bytes
    if size < expected:
        raise UserError(f"{file}: is truncated: {expected - size} bytes of its tensors are missing")
    if size > expected:
        raise UserError(f"{file}: {size - expected} bytes after its last tensor belong to nobody")


def shards_of(folder: Path, index: str = WEIGHTS_INDEX) -> Shards:
    """The tensors of a folder, by its index, or of its one file.

    Raises:
        UserError: no safetensors there (pickled weights are never read), or files and index that contradict each other.
    """
    files = sorted(folder.glob("*.safetensors"))
    written = folder / index
    if not written.exists():
        if len(files) == 1:
            return Shards(files)
        if files:
            raise UserError(f"{folder}: holds {len(files)} safetensors files and no {index}, which says what they are")
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if pickled:
            raise UserError(
                f"{folder}: only pickled weights ({pickled[0]}); they can run code, so only safetensors are read"
            )
        raise UserError(f"{folder}: no weights here: neither {index} nor a .safetensors file")
    weight_map = _weight_map(written)
    for name, listed in weight_map.items():
        if not (folder / listed).is_file():
            raise UserError(f"{written}: names {listed} for tensor {name}, and there is no such file")
    for file in files:
        if file.name not in weight_map.values():
            raise UserError(f"{written}: {file.name} is not in this index, and lies beside it")
    shards = Shards(folder / listed for listed in dict.fromkeys(weight_map.values()))
    for name, listed in weight_map.items():
        if name not in shards.files or shards.files[name].name != listed:
            raise UserError(f"{written}: tensor {name} should be in {listed}, and is not")
    for name in shards.files:
        if name not in weight_map:
            raise UserError(f"{written}: tensor {name} of {shards.files[name].name} is not in this index")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as cause:
        raise UserError(f"{index}: cannot be read: {cause.strerror}") from cause
    except (ValueError, KeyError, TypeError) as cause:
        raise UserError(f"{index}: cannot be read: it is no JSON with a weight_map") from cause
    if not isinstance(weight_map, dict) or not all(
        isinstance(f, str) and f == Path(f).name and f.endswith(".safetensors") for f in weight_map.values()
    ):
        raise UserError(f"{index}: weight_map must give the name of a .safetensors file beside it for every tensor")
    return weight_map
