"""The checkpoints of a folder: which there are, and how one is removed."""

import os
import re
from pathlib import Path

from core.checkpoints.index import INDEX, files_left_over, is_sharded
from core.storage.files import remove_partial_files

STEP = re.compile(r"step-(\d+)\.ckpt")
"""The name of the checkpoint after a step."""

BEST = "best.ckpt"
"""The name of the checkpoint of the best validation loss."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a file, which may be a checkpoint, or a whole sharded checkpoint."""
    return path.is_file() or is_sharded(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole step checkpoints of a run, oldest first."""
    by_step = {}
    for path in (folder / "checkpoints").glob("step-*.ckpt"):
        name = STEP.fullmatch(path.name)
        if name and (is_sharded(path) or not path.is_dir()):
            by_step[int(name[1])] = path
    return [by_step[step] for step in sorted(by_step)]


def step_of(checkpoint: Path) -> int:
    """The step after which a step checkpoint was saved, by its name."""
    name = STEP.fullmatch(checkpoint.name)
    assert name is not None, f"{checkpoint} is not the checkpoint of a step"
    return int(name[1])


def other_checkpoints(path: Path) -> str:
    """The end of an error message that lists the folder's other checkpoints, from which the run can continue."""
    others: list[str] = []
    for other in sorted(path.parent.glob("*.ckpt")):
        if other.name != path.name and is_checkpoint(other):
            others.append(other.name)
    return f"; others here: {', '.join(others)}" if others else ""


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint; a sharded one is none from the moment when its index is gone. Other files in it stay."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    (path / INDEX).unlink(missing_ok=True)
    for file in files_left_over(path):
        file.unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def set_aside(path: Path) -> None:
    """Moves away what a checkpoint of another kind is about to replace; `remove_aside` deletes it afterwards."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        os.replace(path, _aside(path))


def remove_aside(path: Path) -> None:
    """Deletes what was moved away for a checkpoint, which is whole now."""
    if _aside(path).exists():
        remove_checkpoint(_aside(path))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def remove_partial_checkpoints(folder: Path) -> None:
    """Deletes what saves that did not end have left in the folder of a run's checkpoints; it can be large.

    A checkpoint that was about to be replaced by one of another kind takes its place again.
    """
    remove_partial_files(folder)
    for aside in sorted(folder.glob(".*.ckpt.replaced")):
        path = folder / aside.name.removeprefix(".").removesuffix(".replaced")
        if is_checkpoint(path):
            remove_aside(path)
            continue
        if path.is_dir():
            remove_checkpoint(path)
        if not path.exists():
            os.replace(aside, path)
    for path in sorted(folder.glob("*.ckpt")):
        if not (STEP.fullmatch(path.name) or path.name == BEST) or path.is_symlink():
            continue
        if is_sharded(path):
            for file in files_left_over(path):
                file.unlink(missing_ok=True)
        elif path.is_dir():
            remove_checkpoint(path)
