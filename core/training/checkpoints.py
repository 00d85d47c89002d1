"""Checkpoints that a kill cannot break, and reading them with nothing unpickled.

A checkpoint is written under a temporary name in its own folder, forced to disk, and renamed: at every
moment the folder holds whole files only. Reading allows tensors and plain containers.
"""

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from core.contracts.errors import UserError

STEP = re.compile(r"step-(\d+)\.ckpt")


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, force to disk, rename.

        Raises:
            UserError: the disk is full or refuses; the earlier checkpoints are untouched.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as cause:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else "the disk is full or refuses"
            raise UserError(
                f"{target}: this checkpoint cannot be written ({reason}); the earlier ones in its folder are whole: "
                f"make room and continue with --resume {target.parent.parent}"
            ) from cause

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """See `read_checkpoint`."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU, with `weights_only=True`.

    Raises:
        UserError: it is missing, truncated, or not a checkpoint of this program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except PermissionError as cause:
        raise UserError(f"{path}: cannot be read: {cause.strerror}") from cause
    except Exception as cause:  # a damaged file can make the reader stumble anywhere
        why = "it is truncated, damaged or not ours"
        raise UserError(f"{path}: not a whole checkpoint: {why}{_others(path)}") from cause
    if not isinstance(content, dict) or "moeloom" not in content or "state_dict" not in content:
        raise UserError(f"{path}: a file of another program: it holds no moeloom run{_others(path)}")
    return content


def checkpoints_in(folder: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    files = (folder / "checkpoints").glob("step-*.ckpt")
    return sorted((f for f in files if STEP.fullmatch(f.name)), key=lambda f: int(STEP.fullmatch(f.name)[1]))  # type: ignore[index]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that no space is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _others(path: Path) -> str:
    """The other checkpoints of the folder, told so that nobody thinks the run is lost."""
    others = [f.name for f in sorted(path.parent.glob("*.ckpt")) if f != path]
    return f"; others here: {', '.join(others)}" if others else ""
