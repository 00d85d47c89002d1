"""Checkpoints of one file that a kill cannot break: written under a temporary name, forced to disk, and renamed."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from core.checkpoints.content import diverged, not_finite
from core.checkpoints.listing import remove_checkpoint
from core.checkpoints.reading import read_checkpoint
from core.contracts.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint under a temporary name, forces it to disk and renames it.

        Raises:
            UserError: the disk is full or rejects the write; the earlier checkpoints are untouched.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.is_dir():
                remove_checkpoint(target)
            os.replace(temporary, target)
        except (OSError, RuntimeError) as cause:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise not_written(target, cause) from cause

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a checkpoint with `read_checkpoint`, always onto the CPU and with `weights_only=True`.

        Raises:
            UserError: it is damaged.
            NotFiniteError: it is sharded, and has a number with which no run can go on.
        """
        content = read_checkpoint(Path(path))
        if Path(path).is_dir():
            found = not_finite(content)
            if found:
                raise diverged(Path(path), found)
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes a checkpoint."""
        remove_checkpoint(Path(path))

    def wait(self) -> None:
        """Returns when no save is under way: here each is done when it returns."""


def not_written(target: Path, cause: BaseException, who: str = "") -> UserError:
    """The error about a checkpoint that cannot be written."""
    reason = "the disk is full or rejects the write"
    if isinstance(cause, OSError) and cause.strerror:
        reason = cause.strerror
    return UserError(
        f"{target}: this checkpoint cannot be written ({who}{reason}); the earlier ones in its folder are whole: "
        f"free some space and continue with --resume {target.parent.parent}"
    )
