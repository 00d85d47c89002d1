"""Reads checkpoints, of one file or sharded, without unpickling arbitrary objects and after checking their bytes."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoints.averages import AVERAGES
from core.checkpoints.index import INDEX, change_of, is_sharded
from core.checkpoints.listing import other_checkpoints
from core.checkpoints.shards import MODEL, ShardReader, dtype_of
from core.contracts.errors import UserError
from core.storage.documents import DocumentError, check_regular

OPTIMIZERS = "optimizer_states."
"""How the names of optimizers' tensors begin in an index; then follow optimizer, `state`, parameter and key."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's content onto the CPU, with `weights_only=True`, after checking its bytes.

    Raises:
        UserError: it is missing, truncated, changed since it was written, or not a checkpoint of this program.
    """
    if not path.is_dir():
        return _read_file(path)
    reader = open_shards(path)
    with _listing_others(path):
        reader.check()
        return _with_tensors(reader, reader.tensor)


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's content without the numbers of a sharded one, whose tensors are on the meta device.

    Raises:
        UserError: as from `read_checkpoint`, but files with tensors of a sharded checkpoint are not compared with
            their checksums.
    """
    if not path.is_dir():
        return _read_file(path)
    return metadata_of(open_shards(path))


def metadata_of(reader: ShardReader) -> dict[str, Any]:
    """Reads what `read_metadata` does, of a sharded checkpoint that is open."""

    def without_numbers(name: str) -> Tensor:
        found = reader.index.tensors[name]
        return torch.empty(found.shape, dtype=dtype_of(found), device="meta")

    with _listing_others(reader.folder):
        return _with_tensors(reader, without_numbers)


def open_shards(path: Path) -> ShardReader:
    """Opens a sharded checkpoint.

    Raises:
        UserError: it is not whole.
    """
    with _listing_others(path):
        if not is_sharded(path):
            why = f"{INDEX}, which is written last, is missing"
            raise UserError(f"{path}: not a whole checkpoint: {why}")
        try:
            return ShardReader(path)
        except DocumentError as cause:
            why = f"{cause.file.name} {cause.why}"
            raise UserError(f"{path}: not a whole checkpoint: {why}") from cause


@contextmanager
def _listing_others(path: Path) -> Iterator[None]:
    """Adds the folder's other checkpoints to an error message about one."""
    try:
        yield
    except UserError as cause:
        raise UserError(f"{cause}{other_checkpoints(path)}") from cause


def _with_tensors(reader: ShardReader, value_of: Callable[[str], Tensor]) -> dict[str, Any]:
    """The content of a sharded checkpoint with its tensors in their places.

    Raises:
        UserError: the file with the rest has changed, or there is no place in it for a tensor.
    """
    changed = change_of(reader.folder, reader.index, reader.index.rest)
    if changed:
        raise UserError(changed)
    content = _read_file(reader.folder / reader.index.rest)
    try:
        for name in reader.index.tensors:
            if name.startswith(MODEL):
                content["state_dict"][name.removeprefix(MODEL)] = value_of(name)
            elif name.startswith(f"{AVERAGES}."):
                average, tensor = name.removeprefix(f"{AVERAGES}.").split(".", 1)
                content[AVERAGES][average]["weights"][tensor] = value_of(name)
            else:
                number, _, parameter, key = name.removeprefix(OPTIMIZERS).split(".", 3)
                values = content["optimizer_states"][int(number)]["state"][int(parameter)]
                values[key] = value_of(name)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as cause:
        why = f"the tensor {name} has no place in {reader.index.rest}"
        raise UserError(f"{reader.folder}: is damaged: {why}") from cause
    return content


def _read_file(path: Path) -> dict[str, Any]:
    """Reads the content of one file."""
    try:
        check_regular(path)
    except DocumentError as cause:
        if isinstance(cause.__cause__, FileNotFoundError):
            why = f"there is no such checkpoint{other_checkpoints(path)}"
            raise UserError(f"{path}: {why}") from None
        raise UserError(f"{cause}{other_checkpoints(path)}") from cause
    try:
        changed = _changed_record(path)
        if changed is not None:
            why = f"the checksum of its record {changed} is another one"
            raise UserError(
                f"{path}: has changed since it was written: {why}{other_checkpoints(path)}"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as cause:
        raise UserError(f"{path}: cannot be read: {cause.strerror}") from cause
    except Exception as cause:  # a damaged file can make the reader raise anything
        why = "it is truncated, damaged or of another program"
        raise UserError(
            f"{path}: not a whole checkpoint: {why}{other_checkpoints(path)}"
        ) from cause
    others = other_checkpoints(path)
    if not isinstance(content, dict) or "moeloom" not in content or "state_dict" not in content:
        raise UserError(f"{path}: a file of another program: it holds no moeloom run{others}")
    state = content["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: is damaged: its part state_dict holds no tensors by name{others}")
    return content


def _changed_record(path: Path) -> str | None:
    """The first record of a checkpoint whose checksum is not the one that the archive holds; None if there is none.

    torch writes a CRC-32 of each record, and does not compare it when it reads.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()
