"""Mistakes that are found before torch is imported, which takes seconds."""

from pathlib import Path

from core.contracts.errors import UserError
from core.recipe.compose import Recipe
from core.training.launchers import is_first_task
from core.training.run_folder import RunFolder


def check_folders(out: Path | None, resume: str | None) -> None:
    """Raises `UserError` if `--out` holds a run, or `--resume` names a folder without one; makes and locks nothing."""
    if not is_first_task():  # the first one may have made the folder
        return
    check_same_folder(resume, out)
    if resume is None and out is not None:
        RunFolder(out).check_free()
    if resume not in (None, "auto"):
        folder = RunFolder(Path(str(resume)))
        folder.check_has_run()
        check_trained(folder, "start a run from its weights with initial_weights")


def check_same_folder(resume: str | None, out: Path | None) -> None:
    """Raises `UserError` for a run named with `--resume` and another folder with `--out`."""
    if resume in (None, "auto") or out is None:
        return
    if out.resolve() != Path(str(resume)).resolve():
        raise UserError(f"--out {out}: a resumed run stays in its own folder, {resume}")


def check_parent(parent: Path | None, resume: str | None) -> None:
    """Raises `UserError` if `--from` names nothing, or beside a run that continues by itself."""
    if parent is None:
        return
    if resume not in (None, "auto"):
        raise UserError(
            f"--from {parent}: begins a new run, and --resume {resume} continues one in its own folder"
        )
    if not parent.exists():
        raise UserError(
            f"--from {parent}: no checkpoint here: give a run folder or a checkpoint file"
        )


def check_trained(folder: RunFolder, instead: str) -> None:
    """Raises `UserError` for a converted run, which has no corpus and no steps; `instead` says what to do."""
    if folder.converted_weights.exists():
        why = "was converted from another program's files, which say nothing of its training"
        raise UserError(f"{folder.path}: {why}; {instead}")


def check_corpus(recipe: Recipe) -> None:
    """Raises `UserError` for a recipe without a corpus, such as that of a converted run."""
    if recipe.data.corpus is None:
        how = "give the text to train on, such as data.corpus='{name: files, paths: [texts]}'"
        raise UserError(f"{recipe.source}: data.corpus = null: {how}")


def check_initial_weights(recipe: Recipe) -> None:
    """Raises `UserError` if `initial_weights` names a path that does not exist."""
    selection = recipe.selection
    if selection is not None and not Path(selection.path).exists():
        key = (
            "initial_weights" if isinstance(recipe.initial_weights, str) else "initial_weights.path"
        )
        why = "no checkpoint here: give a run folder or a checkpoint file"
        raise UserError(f"{recipe.source}: {key} = {selection.path}: {why}")
