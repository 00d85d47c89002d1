"""Checkpoints that a kill cannot break, read without unpickling arbitrary objects.

A checkpoint is written under a temporary name in its own folder, forced to disk, and renamed: at every
moment the folder holds whole files only. Reading allows tensors and plain containers.
"""

import contextlib
import errno
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from core.contracts.errors import UserError
from core.storage.documents import DocumentError, check_regular

STEP = re.compile(r"step-(\d+)\.ckpt")


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
            os.replace(temporary, target)
        except (OSError, RuntimeError) as cause:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = "the disk is full or rejects the write"
            if isinstance(cause, OSError) and cause.strerror:
                reason = cause.strerror
            raise UserError(
                f"{target}: this checkpoint cannot be written ({reason}); the earlier ones in its folder are whole: "
                f"free some space and continue with --resume {target.parent.parent}"
            ) from cause

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a checkpoint with `read_checkpoint`, always onto the CPU and with `weights_only=True`."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's content onto the CPU, with `weights_only=True`, after checking its bytes.

    Raises:
        UserError: it is missing, truncated, changed since it was written, or not a checkpoint of this program.
    """
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


def checkpoints_in(folder: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    by_step = {}
    for file in (folder / "checkpoints").glob("step-*.ckpt"):
        name = STEP.fullmatch(file.name)
        if name:
            by_step[int(name[1])] = file
    return [by_step[step] for step in sorted(by_step)]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one of its causes, reports that no space is left on the disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def other_checkpoints(path: Path) -> str:
    """The end of an error message that lists the folder's other checkpoints, from which the run can continue."""
    others: list[str] = []
    for file in sorted(path.parent.glob("*.ckpt")):
        if file.name != path.name and file.is_file():
            others.append(file.name)
    return f"; others here: {', '.join(others)}" if others else ""
