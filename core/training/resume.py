"""Resuming a run: which checkpoint it continues from, and whether it is still the same run."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.checkpoints.content import check_content, diverged, not_finite
from core.checkpoints.listing import checkpoints_in, is_checkpoint
from core.checkpoints.reading import open_shards, read_metadata
from core.contracts.errors import ConfigError, UserError
from core.data.tokenizer_file import load_tokenizer_file
from core.extension.plugin_file import digest_of_code, is_plugin_file
from core.recipe.compose import Recipe, compose_run
from core.storage.lock import LOCK, is_locked
from core.training.early_checks import check_trained
from core.training.run_folder import RunFolder


class RunningWarning(UserWarning):
    """A checkpoint of a run that is still training; the commands print it in one line."""


REPRODUCED = (
    "seed",
    "model",
    "precision",
    "data",
    "optimizer",
    "batch",
    "budget",
    "gradient_clip",
    "skip_spikes",
    "initial_weights",
    "freeze",
)
"""Sections that a resumed run must share with the one it continues; otherwise it would be another run."""

MAY_CHANGE = ("strategy", "compile", "cuda_graph", "trainer")
"""Sections that may change; the resumed run then reaches other bits."""


@dataclass(frozen=True)
class Resume:
    """A checkpoint to continue from.

    Args:
        path: the file.
        step: windows that were done when it was saved.
        content: what the file holds; the tensors of a sharded checkpoint are on the meta device.
    """

    path: Path
    step: int
    content: Mapping[str, Any]


def check_recipe_unchanged(
    recipe: Recipe, folder: RunFolder, say: Callable[[str], None], *, trust: bool = False
) -> bool:
    """Compares a recipe with the one that the run was started with, and warns where the bits may differ.

    The corpus is not compared here, because its documents decide: the folder that holds them may have moved.

    Returns:
        Whether the recipe names the corpus in another way.

    Raises:
        UserError: another recipe (the first difference is named), or a run that cannot be continued.
    """
    check_trained(folder, "start a run from its weights with initial_weights")
    started = compose_run(folder.recipe, trust=trust, named=recipe.plugins)
    _check_code_unchanged(recipe, started, folder)
    check_tokenizer_unchanged(recipe, started, folder, "--resume")
    before = started.to_dict()
    now = recipe.to_dict()
    corpora = [
        [values["data"].pop("corpus"), values["data"].pop("validation")] for values in (before, now)
    ]
    for values in (before, now):
        # the run holds a copy of its own, and the content decides
        for key in ("file", "pattern"):
            values["data"]["tokenizer"].pop(key)
    difference = _first_difference_in(REPRODUCED, before, now)
    if difference:
        path, old, new = difference
        raise UserError(
            f"--resume {folder.path}: {path} = {new} here, but the run was started with {old}"
        )
    difference = _first_difference_in(MAY_CHANGE, before, now)
    if difference:
        path, old, new = difference
        say(
            f"{path} = {new} here, and the run was started with {old}: it continues, but not with the same bits"
        )
    if torch.cuda.is_available() and not recipe.trainer.get("deterministic"):
        say(
            "without trainer.deterministic a GPU does not promise the same bits as if the run had never stopped"
        )
    return bool(corpora[0] != corpora[1])


def _check_code_unchanged(recipe: Recipe, started: Recipe, folder: RunFolder) -> None:
    """Raises `UserError` if a plugin file of the recipe is not the one that the run was started with."""
    code = {file.name: digest_of_code(file) for file in _plugin_files(started)}
    for file in _plugin_files(recipe):
        held = folder.plugin_files / file.name
        if digest_of_code(file) != code.get(file.name):
            raise UserError(
                f"--resume {folder.path}: {file} is not the code that the run was started with, which is {held}"
            )


def check_tokenizer_unchanged(
    recipe: Recipe, started: Recipe, folder: RunFolder, option: str
) -> None:
    """Raises `UserError` if the tokenizer's file of the recipe is not the one that the run was started with.

    Args:
        recipe: the recipe.
        started: that of the run.
        folder: the run.
        option: the option that named the run.
    """
    section = recipe.data.tokenizer
    if section.file is None or started.data.tokenizer.file is None:
        return  # a tokenizer that is trained has no markers in the recipe, which is compared
    if Path(section.file) == folder.tokenizer:
        return
    try:
        found = load_tokenizer_file(
            Path(section.file), pattern=section.pattern, begin=section.begin, end=section.end
        )
    except ConfigError as error:
        raise UserError(f"{recipe.source}: data.tokenizer.{error.key}: {error.why}") from error
    if found.identity() != folder.load_tokenizer().identity():
        raise UserError(
            f"{option} {folder.path}: {section.file} is not the tokenizer that the run was started "
            f"with, which is {folder.tokenizer}"
        )


def _plugin_files(recipe: Recipe) -> list[Path]:
    return [Path(name) for name in recipe.plugins if is_plugin_file(name)]


def newest(folder: RunFolder) -> Resume | None:
    """The checkpoint that a resumed run starts from; None if the run was stopped before its first one.

    The numbers of a sharded one are read and checked when the ranks take their parts of them.

    Raises:
        UserError: a damaged checkpoint.
        NotFiniteError: weights or moments with which every further step would fail.
    """
    files = checkpoints_in(folder.path)
    return read_start(files[-1]) if files else None


def read_start(checkpoint: Path) -> Resume:
    """A checkpoint as a start of training.

    Raises:
        UserError: it is damaged.
        NotFiniteError: weights or moments with which every further step would fail.
    """
    content = read_metadata(checkpoint)
    check_content(content, checkpoint)
    found = not_finite(content)
    if found:
        raise diverged(checkpoint, found)
    return Resume(checkpoint, content["moeloom"]["windows_done"], content)


def _first_difference_in(
    sections: tuple[str, ...], old: dict[str, Any], new: dict[str, Any]
) -> tuple[str, Any, Any] | None:
    return first_difference({k: old[k] for k in sections}, {k: new[k] for k in sections})


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Key path and both values of the first place where two containers differ, in the old one's order."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{path}.{key}" if path else str(key)
            found = first_difference(old.get(key), new.get(key), inner)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            found = first_difference(a, b, f"{path}.{index}")
            if found:
                return found
        return None
    return None if old == new else (path, old, new)


def newest_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder, or the index of a converted run's weights; a file is returned as it is.

    Warns if the run is still training, because it replaces its checkpoints.

    Raises:
        UserError: there is none.
    """
    if is_checkpoint(path):
        return path
    if path.is_dir() and path.suffix == ".ckpt":
        open_shards(path)  # says what is missing
    files = checkpoints_in(path)
    converted = RunFolder(path).converted_weights
    if not files and converted.is_file():
        return converted
    if not files:
        raise UserError(f"{path}: no checkpoint here: give a run folder or a checkpoint file")
    if is_locked(path / LOCK):
        why = f"its newest checkpoint, {files[-1].name}, is used"
        warnings.warn(f"{path}: this run is still training: {why}", RunningWarning, stacklevel=1)
    return files[-1]
