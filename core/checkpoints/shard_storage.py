"""How the shards of a checkpoint are stored: in safetensors files with checksums, and an index that is written last.

torch.distributed.checkpoint (DCP) plans which rank writes what, and which stored shards a rank needs. Its own files are
pickles; these are not, so nothing is unpickled when they are read.
"""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from core.checkpoints.index import (
    FileRecord,
    ShardedTensor,
    ShardIndex,
    StoredShard,
    files_left_over,
)
from core.checkpoints.listing import remove_aside, set_aside
from core.checkpoints.shards import ShardReader, dtype_of
from core.storage.files import sync_folder

FILE_BYTES = 2**28
"""A file is closed when its tensors have this many bytes."""

WRITERS = 8
"""Files that a rank writes at a time; each is held in memory twice meanwhile."""


class ShardWriter(StorageWriter):
    """Writes parts into the files of a sharded checkpoint, and at last its index.

    Args:
        folder: the checkpoint.
        rest: the bytes of the file with everything but tensors, which the first rank writes.
    """

    def __init__(self, folder: Path, rest: bytes) -> None:
        self.folder = folder
        self.rest = rest
        self.token = secrets.token_hex(4)
        self.written: list[Path] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another save; nothing is kept of an earlier one."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Prepares nothing: folders are made when all ranks have planned."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Gives each rank its number, with which the names of its files begin, and makes the folder."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            set_aside(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        return [
            SavePlan(plan.items, rank, plan.planner_data, plan.usable)
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's parts, several files at a time."""

        def write(number: int, items: Sequence[WriteItem]) -> list[WriteResult]:
            tensors: dict[str, Tensor] = {}
            for item in items:
                part = planner.resolve_data(item)
                assert isinstance(part, Tensor)
                tensors[item.index.fqn] = part.detach().cpu().contiguous()
            name = f"rank-{plan.storage_data:05d}-{self.token}-{number:03d}.safetensors"
            content = safetensors.torch.save(tensors)
            self.written.append(self.folder / name)
            _write(self.folder / name, content)
            record = FileRecord.of(content)
            return [WriteResult(item.index, record.size, (name, record)) for item in items]

        with ThreadPoolExecutor(WRITERS) as pool:
            files = list(_files(plan.items))
            written = list(pool.map(write, range(len(files)), files))
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for results in written for result in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes everything but tensors, and the index; then removes the files of an earlier save."""
        rest = f"rest-{self.token}.pt"
        self.written.append(self.folder / rest)
        _write(self.written[-1], self.rest)
        files = {rest: FileRecord.of(self.rest)}
        place: dict[tuple[str, tuple[int, ...]], str] = {}
        for result in (one for of_rank in results for one in of_rank):
            name, record = result.storage_data
            files[name] = record
            place[result.index.fqn, tuple(result.index.offset or ())] = name
        tensors: dict[str, ShardedTensor] = {}
        for name, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            shards = [
                StoredShard(
                    place[name, tuple(chunk.offsets)], tuple(chunk.offsets), tuple(chunk.sizes)
                )
                for chunk in found.chunks
            ]
            tensors[name] = ShardedTensor(
                _name_of(found.properties.dtype), tuple(found.size), tuple(shards)
            )
        sync_folder(self.folder)
        ShardIndex(rest, files, tensors).write(self.folder)
        sync_folder(self.folder.parent)
        remove_aside(self.folder)
        for file in files_left_over(self.folder):
            file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Deletes what this rank has written, after all ranks have agreed that the save failed.

        Where a rank has just died nothing is known: its index may be on the disk, and lists the files of all ranks.
        """
        left = set(files_left_over(self.folder))
        for file in self.written:
            if file in left:
                with suppress(OSError):
                    file.unlink(missing_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a path can be one of a checkpoint: any can."""
        return True


class ShardStorageReader(StorageReader):
    """Lets DCP read the files of a sharded checkpoint; `torch.distributed.checkpoint.load` takes it as storage reader.

    Args:
        reader: the checkpoint.
    """

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensors and their parts, from the index."""
        tensors: dict[str, Any] = {}
        files: dict[MetadataIndex, StoredShard] = {}
        for name, tensor in self.reader.index.tensors.items():
            chunks = []
            for shard in tensor.shards:
                offsets = torch.Size(shard.offsets)
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(shard.shape)))
                files[MetadataIndex(name, offsets)] = shard
            properties = TensorProperties(dtype=dtype_of(tensor))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        return Metadata(tensors, storage_data=files)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Notes in which file each part is."""
        self.files: Mapping[MetadataIndex, StoredShard] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what this rank needs, straight into its tensors."""
        for item in plan.items:
            place = tuple(
                slice(offset, offset + length)
                for offset, length in zip(item.storage_offsets, item.lengths, strict=True)
            )
            stored = self.files[item.storage_index]
            target = planner.resolve_tensor(item)
            target.detach().copy_(self.reader.read_stored(item.storage_index.fqn, stored, place))
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a path can be one of a checkpoint: any can."""
        return True


def _files(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    """Yields the items that share a file: of one kind, the model's or an optimizer's, and with one part of a tensor."""
    by_kind: dict[str, list[WriteItem]] = {}
    for item in items:
        by_kind.setdefault(item.index.fqn.partition(".")[0], []).append(item)
    for kind in by_kind.values():
        file: list[WriteItem] = []
        names: set[str] = set()
        held = 0
        for item in kind:
            if held >= FILE_BYTES or item.index.fqn in names:
                yield file
                file, names, held = [], set(), 0
            file.append(item)
            names.add(item.index.fqn)
            held += item.tensor_storage_size() or 0
        yield file


def _name_of(dtype: torch.dtype) -> str:
    """Torch's name for a number format, as an index has it."""
    return str(dtype).removeprefix("torch.")


def _write(file: Path, content: bytes) -> None:
    """Writes a file and forces it to the disk."""
    with file.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
