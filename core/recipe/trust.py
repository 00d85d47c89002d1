"""Which recipes may name code: the user's own, and those of runs that this user's machine has made.

A recipe may name modules under `plugins`, which are imported. A file in a run folder may have come from somebody else,
so its modules are imported only if an installed distribution registers them, if this machine has recorded the file, or
if the user trusts it. A record is the hash of the file's contents: a run that was moved or copied is still known, an
edited recipe is not. Plugin files that a run holds are recorded in the same way.
"""

import hashlib
import os
from collections.abc import Collection
from pathlib import Path

from core.contracts.errors import UserError
from core.extension.loader import installed_registry
from core.extension.plugin_file import is_plugin_file
from core.storage import records
from core.storage.documents import DocumentError, read_bytes
from core.storage.files import check_links

RECIPES = "recipes"
"""The kind of the records of recipes that this machine has written."""

PLACES = "places"
"""The kind of the records of recipes together with their folders."""

CODE = "code"
"""The kind of the records of plugin files that runs of this machine hold."""

RUN_FILES = ("provenance.json", "checkpoints", "weights")
"""The names of which any one, beside `recipe.yaml`, makes a folder a run folder."""


def record(file: Path) -> None:
    """Records that this machine has written a recipe or a sweep file, and where."""
    records.add(RECIPES, _digest(file))
    records.add(PLACES, _place(file))


def is_recorded(file: Path) -> bool:
    """Whether this machine has written a file with these contents."""
    try:
        return records.contains(RECIPES, _digest(file))
    except DocumentError:
        return False


def is_of_a_run(file: Path) -> bool:
    """Whether a file lies in a run folder or a sweep's folder, at any depth; links are looked at from both ends."""
    folders = {*file.absolute().parents, *Path(os.path.realpath(file)).parents}
    return any(map(_is_run_folder, folders))


def _is_run_folder(folder: Path) -> bool:
    if (folder / "recipe.yaml").exists():
        return any((folder / name).exists() for name in RUN_FILES)
    return (folder / "sweep.json").exists() and (folder / "recipes").is_dir()


def check_modules(file: Path, key: str, modules: Collection[str]) -> None:
    """Checks the modules that a file names which this machine may not have made.

    Raises:
        UserError: no installed distribution registers one of them, and the file is not recorded.
    """
    recorded = is_recorded(file)
    for module in filter(is_plugin_file, modules):
        if not (recorded and _is_own_code(Path(module))):
            raise UserError(
                f"{file}: {key}: the code in {module} would run, which was not put there by this machine; "
                "--trust allows it"
            )
    if not modules or recorded:
        return
    installed = installed_registry()
    owners = [*installed.disabled, *(broken.owner for broken in installed.broken)]
    registered = installed.modules() | {owner.module for owner in owners}
    for module in modules:
        if module not in registered and not is_plugin_file(module):
            raise UserError(
                f"{file}: {key}: the module {module!r} would run, which no installed distribution registers, "
                "and this run was not made here; --trust allows it"
            )


def record_code(file: Path) -> None:
    """Records that this machine has copied the code of a plugin file into a run."""
    records.add(CODE, _digest(file))


def _is_own_code(file: Path) -> bool:
    """Whether a plugin file is the user's own, or the copy of one that this machine has put into a run."""
    if not is_of_a_run(file):
        return True
    try:
        return records.contains(CODE, _digest(file))
    except DocumentError:
        return False


def is_named(module: str, named: Collection[str]) -> bool:
    """Whether the user has named a module, or a file with the same code."""
    if module in named:
        return True
    if not is_plugin_file(module):
        return False
    try:
        code = _digest(Path(module))
        return any(code == _digest(Path(other)) for other in filter(is_plugin_file, named))
    except DocumentError:
        return False


def check_run_links(recipe: Path) -> None:
    """Checks that no symbolic link in a run folder leads out of it: commands would read or write what it names.

    A run that this machine has made, and that is still where it was made, may have such links.

    Args:
        recipe: the run's `recipe.yaml`.

    Raises:
        UserError: a link does; the message names `--trust`.
    """
    try:
        check_links(recipe.parent)
    except UserError as cause:
        if not _is_recorded_here(recipe):
            raise UserError(f"{cause}; --trust allows it") from cause


def _is_recorded_here(recipe: Path) -> bool:
    """Whether this machine has written the recipe at this place."""
    try:
        return records.contains(PLACES, _place(recipe))
    except DocumentError:
        return False


def _place(recipe: Path) -> str:
    """A recipe and the folder that it is in, as a record."""
    folder = hashlib.sha256(os.fsencode(os.path.realpath(recipe.parent))).hexdigest()
    return f"{_digest(recipe)} {folder}"


def _digest(file: Path) -> str:
    return hashlib.sha256(read_bytes(file)).hexdigest()
