"""Writing safetensors files whose tensors arrive in any order and in parts.

All headers are known beforehand, so the files are made in their full length first: a disk that is too small says so
before a byte is moved, and every part has its place.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.interop.shards import FORMATS
from core.interop.tensors import Kind
from core.training.folder import WEIGHTS_INDEX

SHARD_BYTES = 5 * 10**9
"""The largest file, unless one tensor is larger."""

_WRITTEN = {dtype: name for name, dtype in FORMATS.items()}


@dataclass(frozen=True)
class Plan:
    """Which tensors stand in which file.

    Args:
        files: for each file its tensors in order.
        index: whether an index says so too.
    """

    files: Mapping[str, Mapping[str, Kind]]
    index: bool

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(kind.bytes for kinds in self.files.values() for kind in kinds.values())


def planned(kinds: Mapping[str, Kind], limit: int = SHARD_BYTES, *, index: bool | None = None) -> Plan:
    """Tensors in order, in files of at most `limit` bytes; an index where there are several, or always."""
    groups: list[dict[str, Kind]] = [{}]
    held = 0
    for name, kind in kinds.items():
        if groups[-1] and held + kind.bytes > limit:
            groups.append({})
            held = 0
        groups[-1][name] = kind
        held += kind.bytes
    if len(groups) == 1:
        return Plan({"model.safetensors": groups[0]}, bool(index))
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return Plan(dict(zip(names, groups, strict=True)), True)


class Writer:
    """Preallocated safetensors files in a folder.

    Args:
        folder: must exist.
        plan: what is written where.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.kinds = {name: kind for kinds in plan.files.values() for name, kind in kinds.items()}
        self._file: dict[str, str] = {}
        self._begin: dict[str, int] = {}
        self._open: dict[str, int] = {}
        self._headers = {file: self._header(file, kinds) for file, kinds in plan.files.items()}

    def _header(self, file: str, kinds: Mapping[str, Kind]) -> bytes:
        """The bytes before the tensors; the widest formats come first, so that every tensor is aligned."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, kind in sorted(kinds.items(), key=lambda item: -item[1].dtype.itemsize):
            offsets = [at, at + kind.bytes]
            entries[name] = {"dtype": _WRITTEN[kind.dtype], "shape": list(kind.shape), "data_offsets": offsets}
            self._file[name], self._begin[name] = file, at
            at += kind.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in kinds:
            self._begin[name] += 8 + len(text)
        return struct.pack("<Q", len(text)) + text

    def create(self) -> None:
        """Make the files in their full length, and the index.

        Raises:
            OSError: no space is left.
        """
        for file, header in self._headers.items():
            size = len(header) + sum(kind.bytes for kind in self.plan.files[file].values())
            with (self.folder / file).open("wb") as stream:
                _reserve(stream.fileno(), size)
                stream.write(header)
        if self.plan.index:
            index = {"metadata": {"total_size": self.plan.bytes}, "weight_map": dict(sorted(self._file.items()))}
            (self.folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Put rows in their place, in the planned format."""
        kind = self.kinds[name]
        assert rows.dtype == kind.dtype, f"{name}: {rows.dtype} is not the planned {kind.dtype}"
        if rows.numel() == 0:
            return
        view = memoryview(rows.contiguous().view(torch.uint8).numpy().reshape(-1).data)
        at = self._begin[name] + first * kind.row_bytes
        while view:
            done = os.pwrite(self._descriptor(name), view, at)
            view, at = view[done:], at + done

    def sync(self) -> None:
        """Force what was written to the disk, and close the files."""
        for descriptor in self._open.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, name: str) -> int:
        file = self._file[name]
        if file not in self._open:
            if len(self._open) >= 64:
                self.sync()
            self._open[file] = os.open(self.folder / file, os.O_RDWR)
        return self._open[file]


def _reserve(descriptor: int, size: int) -> None:
    """A file's full length in zeros, on the disk where the system can promise that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
