"""Writing safetensors files whose tensors arrive in any order and in parts.

All headers are known beforehand, so the files are first created in their full length. A disk that is too small is
reported before any tensor is written, and each part is written at its known offset.
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
from core.interop.tensors import TensorSpec
from core.training.run_folder import WEIGHTS_INDEX

SHARD_BYTES = 5 * 10**9
"""Largest size of a file in bytes; a file whose only tensor is larger may exceed it."""

_WRITTEN = {dtype: name for name, dtype in FORMATS.items()}


@dataclass(frozen=True)
class FilePlan:
    """Which tensors are written into which file.

    Args:
        files: the tensors of each file in order, by file name.
        index: whether an index of the files is written too.
    """

    files: Mapping[str, Mapping[str, TensorSpec]]
    index: bool

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        total = 0
        for specs in self.files.values():
            total += sum(spec.bytes for spec in specs.values())
        return total


def planned(
    specs: Mapping[str, TensorSpec], limit: int = SHARD_BYTES, *, index: bool | None = None
) -> FilePlan:
    """Distributes tensors in order over files of at most `limit` bytes.

    Args:
        specs: the tensors, by name.
        limit: bytes of a file; a larger tensor gets a file of its own.
        index: whether a single file gets an index too; several files always do.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    held = 0
    for name, spec in specs.items():
        if groups[-1] and held + spec.bytes > limit:
            groups.append({})
            held = 0
        groups[-1][name] = spec
        held += spec.bytes
    if len(groups) == 1:
        return FilePlan({"model.safetensors": groups[0]}, bool(index))
    files = {}
    for number, group in enumerate(groups, start=1):
        files[f"model-{number:05d}-of-{len(groups):05d}.safetensors"] = group
    return FilePlan(files, True)


class ShardWriter:
    """Preallocated safetensors files in a folder.

    Args:
        folder: must exist.
        plan: the files and their tensors.
    """

    def __init__(self, folder: Path, plan: FilePlan) -> None:
        self.folder = folder
        self.plan = plan
        self.specs: dict[str, TensorSpec] = {}
        for specs in plan.files.values():
            self.specs.update(specs)
        self._file: dict[str, str] = {}
        self._begin: dict[str, int] = {}
        self._open: dict[str, int] = {}
        self._headers = {file: self._header(file, specs) for file, specs in plan.files.items()}

    def _header(self, file: str, specs: Mapping[str, TensorSpec]) -> bytes:
        """Returns the bytes before the tensors; the widest formats come first, so that every tensor is aligned."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        widest_first = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)
        at = 0
        for name, spec in widest_first:
            offsets = [at, at + spec.bytes]
            entries[name] = {
                "dtype": _WRITTEN[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": offsets,
            }
            self._file[name] = file
            self._begin[name] = at
            at += spec.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in specs:
            self._begin[name] += 8 + len(text)
        return struct.pack("<Q", len(text)) + text

    def create(self) -> None:
        """Creates the files in their full length, and the index.

        Raises:
            OSError: no space is left on the disk.
        """
        for file, header in self._headers.items():
            size = len(header) + sum(spec.bytes for spec in self.plan.files[file].values())
            with (self.folder / file).open("wb") as stream:
                _reserve(stream.fileno(), size)
                stream.write(header)
        if self.plan.index:
            index = {
                "metadata": {"total_size": self.plan.bytes},
                "weight_map": dict(sorted(self._file.items())),
            }
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / WEIGHTS_INDEX).write_text(text, encoding="utf-8")

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Writes rows of a tensor, the first of them at row `first`; they must have the planned format."""
        spec = self.specs[name]
        assert rows.dtype == spec.dtype, f"{name}: {rows.dtype} is not the planned {spec.dtype}"
        if rows.numel() == 0:
            return
        view = memoryview(rows.contiguous().view(torch.uint8).numpy().reshape(-1).data)
        at = self._begin[name] + first * spec.row_bytes
        while view:
            done = os.pwrite(self._descriptor(name), view, at)
            view = view[done:]
            at = at + done

    def sync(self) -> None:
        """Flushes what was written to the disk, and closes the files."""
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
    """Gives a file its full length in zeros; its space is allocated where the system supports that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
