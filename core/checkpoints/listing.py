"""The checkpoints of a folder: which there are, and how one is removed."""

import re
from pathlib import Path

from core.checkpoints.index import INDEX, files_left_over, is_sharded
from core.storage.files import remove_partial_files

STEP = re.compile(r"step-(\d+)\.ckpt")
"""The name of the checkpoint after a step."""


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


def other_checkpoints(path: Path) -> str:
    """The end of an error message that lists the folder's other checkpoints, from which the run can continue."""
    others: list[str] = []
    for other in sorted(path.parent.glob("*.ckpt")):
        if other.name != path.name and is_checkpoint(other):
            others.append(other.name)
    return f"; others here: {', '.join(others)}" if others else ""


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint; a sharded one is none from the moment when its index is gone."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    (path / INDEX).unlink(missing_ok=True)
    for file in files_left_over(path):
        file.unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def remove_partial_checkpoints(folder: Path) -> None:
    """Deletes what saves that did not end have left in the folder of a run's checkpoints; it can be large."""
    remove_partial_files(folder)
    for path in sorted(folder.glob("*.ckpt")):
        if not path.is_dir() or path.is_symlink():
            continue
        if is_sharded(path):
            for file in files_left_over(path):
                file.unlink(missing_ok=True)
        else:
            remove_checkpoint(path)
