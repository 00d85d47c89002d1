"""Checkpoints in shards, of which every rank writes its own.

A sharded checkpoint is whole from the moment when its index is, which is written last (`core.checkpoints.index`). At
every moment a run's folder holds whole checkpoints only, beside what a save has not finished.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from core.checkpoints.averages import AVERAGES, index_prefix
from core.checkpoints.distributed import save_shards
from core.checkpoints.reading import OPTIMIZERS
from core.checkpoints.saving import AtomicCheckpointIO, not_written
from core.checkpoints.shards import MODEL
from core.checkpoints.tensor_shard import TensorShard


class ShardedCheckpointIO(AtomicCheckpointIO):
    """Checkpoints of which each rank writes the parts that it holds; every rank calls each method.

    In the content that is saved, the tensors of the model and of the optimizers are `TensorShard`s.

    Args:
        asynchronous: whether training goes on while a checkpoint is written. The next save waits for it.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        super().__init__()
        self.asynchronous = asynchronous
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Path, Future[Any]] | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks by gloo, which can work beside the exchanges of training; made at the first use, on every rank."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Saves a checkpoint, or begins to.

        Raises:
            UserError: a rank could not write this one or, if saves are asynchronous, the one before.
        """
        self.wait()
        parts, rest = split_content(checkpoint)
        folder = Path(path)
        with _as_user_error(folder):
            pending = save_shards(parts, rest, folder, self.group, asynchronous=self.asynchronous)
        if pending is not None:
            self._pending = folder, pending

    def is_saving(self, path: Path) -> bool:
        """Whether a save of this checkpoint is under way."""
        return self._pending is not None and self._pending[0] == path

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            UserError: a rank could not write it.
        """
        if self._pending is None:
            return
        folder, pending = self._pending
        self._pending = None
        with _as_user_error(folder):
            pending.result()

    def teardown(self) -> None:
        """Waits for a save that is under way."""
        self.wait()


def split_content(content: dict[str, Any]) -> tuple[dict[str, TensorShard], dict[str, Any]]:
    """The tensors of model, averages and optimizers by name, and everything else of a checkpoint."""
    parts: dict[str, TensorShard] = {}
    state: dict[str, Any] = {}
    for name, value in content["state_dict"].items():
        if isinstance(value, TensorShard):
            parts[f"{MODEL}{name}"] = value
        else:
            state[name] = value
    optimizers: list[dict[str, Any]] = []
    for number, optimizer in enumerate(content.get("optimizer_states", [])):
        kept: dict[int, dict[str, Any]] = {}
        for parameter, values in optimizer["state"].items():
            kept[parameter] = {}
            for key, value in values.items():
                if isinstance(value, TensorShard):
                    parts[f"{OPTIMIZERS}{number}.state.{parameter}.{key}"] = value
                else:
                    kept[parameter][key] = value
        optimizers.append({**optimizer, "state": kept})
    rest = {**content, "state_dict": state, "optimizer_states": optimizers}
    if AVERAGES in content:
        rest[AVERAGES] = {}
        for average, entry in content[AVERAGES].items():
            rest[AVERAGES][average] = {**entry, "weights": {}}
            for name, part in entry["weights"].items():
                parts[f"{index_prefix(average)}{name}"] = part
    return parts, rest


@contextlib.contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """Turns a failure to write on some rank into a `UserError` on every rank.

    What is neither of the disk nor of torch is an error of the program, and raised as it is.
    """
    try:
        yield
    except CheckpointException as failed:
        rank, (cause, _) = min(failed.failures.items())
        if not isinstance(cause, OSError | RuntimeError):
            raise cause from failed
        raise not_written(folder, cause, f"rank {rank}: ") from cause
    except OSError as cause:
        raise not_written(folder, cause) from cause
