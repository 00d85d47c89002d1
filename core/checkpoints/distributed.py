"""Saves and loads sharded checkpoints over ranks, by torch.distributed.checkpoint (DCP).

Each rank says which parts of which tensors it holds. DCP plans which rank writes what, so that a tensor that several
ranks hold is written once, and which stored shards a rank needs, whatever the layout was when they were written.
"""

import io
from collections.abc import Mapping
from concurrent.futures import Future as SaveFuture
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from core.checkpoints.shard_storage import ShardStorageReader, ShardWriter
from core.checkpoints.shards import ShardReader
from core.checkpoints.tensor_shard import TensorShard
from core.contracts.errors import UserError


def _chunk(part: TensorShard) -> ChunkStorageMetadata:
    """The place of a part, as DCP says it."""
    return ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.shape)


class ShardSavePlanner(DefaultSavePlanner):
    """Plans the writing of parts.

    Args:
        parts: those of this rank, by the names of their tensors.
    """

    def __init__(self, parts: Mapping[str, TensorShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def create_local_plan(self) -> SavePlan:
        """Plans to write every part that holds a number."""
        items = [
            WriteItem(
                index=MetadataIndex(name, torch.Size(part.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(part),
                    properties=TensorProperties(dtype=part.tensor.dtype),
                    size=torch.Size(part.shape),
                ),
            )
            for name, part in self.parts.items()
            if part.tensor.numel()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The part that an item writes."""
        tensor: Tensor = self.state_dict[index.fqn]
        return tensor


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of parts, into the tensors that hold them.

    Args:
        parts: those of this rank, by the names of their tensors.
    """

    def __init__(self, parts: Mapping[str, TensorShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def create_local_plan(self) -> LoadPlan:
        """Plans to read whatever stored parts overlap with those of this rank."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, part in self.parts.items():
            if part.tensor.numel():
                stored = self.metadata.state_dict_metadata[name]
                items += create_read_items_for_chunk_list(name, stored, [_chunk(part)])  # type: ignore[arg-type]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor into which an item is read."""
        return self.parts[index.fqn].tensor


def save_shards(
    parts: Mapping[str, TensorShard],
    rest: Any,
    folder: Path,
    group: dist.ProcessGroup,
    *,
    asynchronous: bool,
) -> "SaveFuture[Any] | None":
    """Saves a sharded checkpoint; every rank calls this.

    Args:
        parts: this rank's parts by the names of their tensors; all ranks name the same tensors.
        rest: everything else, in plain containers and small tensors; that of the first rank is written.
        folder: the checkpoint; its index is replaced when all else is on the disk.
        group: all ranks, by a backend for tensors of the CPU, which nothing else uses while a save is under way.
        asynchronous: whether the parts are copied now and written while the caller goes on.

    Returns:
        None when all is written; if `asynchronous`, a future that is done then.

    Raises:
        CheckpointException: a rank could not write; it holds the exception of each rank that failed.
    """
    content = io.BytesIO()
    if dist.get_rank() == 0:
        torch.save(rest, content)
    writer = ShardWriter(folder, content.getvalue())
    options: dict[str, Any] = {
        "storage_writer": writer,
        "planner": ShardSavePlanner(parts),
        "process_group": group,
    }
    tensors = {name: part.tensor.detach() for name, part in parts.items()}
    if not asynchronous:
        try:
            save(tensors, **options)
        except CheckpointException:
            writer.discard()
            raise
        return None
    future = async_save(tensors, **options)
    assert isinstance(future, SaveFuture)

    def discard_if_failed(done: "SaveFuture[Any]") -> None:
        if isinstance(done.exception(), CheckpointException):
            writer.discard()

    future.add_done_callback(discard_if_failed)
    return future


def load_shards(parts: Mapping[str, TensorShard], reader: ShardReader) -> None:
    """Reads parts of tensors of a sharded checkpoint into the tensors that hold them; every rank calls this.

    Args:
        parts: this rank's parts by the names of their tensors, which need not be those that were written.
        reader: the checkpoint.

    Raises:
        UserError: a rank could not read its parts; raised on every rank.
    """
    tensors = {name: part.tensor for name, part in parts.items()}
    storage = ShardStorageReader(reader)
    try:
        load(tensors, storage_reader=storage, planner=ShardLoadPlanner(parts))
    except CheckpointException as failed:
        rank, (cause, _) = min(failed.failures.items())
        why = " ".join(str(cause).split())[:300]
        raise UserError(f"{reader.folder}: rank {rank} cannot read its parts: {why}") from cause
