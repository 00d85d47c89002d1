"""Chooses the run folder of a command: a new one, or that of the run to continue."""

import glob
from pathlib import Path

from core.contracts.errors import UserError
from core.training.early_checks import check_same_folder
from core.training.run_folder import RunFolder

RUNS = Path("runs")
"""The folder of all runs that are started without `--out`."""


def start_folder(out: Path | None, name: str) -> RunFolder:
    """Returns the folder of a new run: `out`, or the first of `runs/name`, `runs/name-2`, ... that does not exist.

    The folder is made at once, so that two runs which start together get different ones.

    Raises:
        UserError: the folder cannot be made.
    """
    if out is not None:
        return RunFolder(out)
    number = 1
    folder = RUNS / name
    while not _made(folder):
        number += 1
        folder = RUNS / f"{name}-{number}"
    return RunFolder(folder, is_new=True)


def _made(folder: Path) -> bool:
    """Makes a folder; False if it exists."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as cause:
        raise UserError(f"{folder}: cannot be written: {cause.strerror}") from cause
    return True


def resumable(resume: str | None, out: Path | None, name: str) -> Path | None:
    """The folder of the run to continue; None if a new run is to start.

    `auto` means `out` if it holds a run, without `out` the newest run of this recipe that has no summary.

    Raises:
        UserError: a run named with `--resume` and another folder with `--out`.
    """
    if resume is None:
        return None
    if resume != "auto":
        check_same_folder(resume, out)
        return Path(resume)
    if out is not None:
        return out if (out / "recipe.yaml").exists() else None
    incomplete = []
    for recipe in RUNS.glob(f"{glob.escape(name)}*/recipe.yaml"):
        run = recipe.parent
        if _is_named_after(run.name, name) and not (run / "summary.json").exists():
            incomplete.append(run)
    return max(incomplete, key=lambda run: (run / "recipe.yaml").stat().st_mtime, default=None)


def _is_named_after(folder: str, name: str) -> bool:
    """Whether `start_folder` gives this folder name to a recipe: its name, alone or with `-` and a number."""
    rest = folder.removeprefix(name)
    return rest == "" or (rest.startswith("-") and rest[1:].isdecimal())
