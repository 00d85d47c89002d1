"""The files that a recipe is read from, and what those of other people's runs may name."""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.extension.plugin_file import is_plugin_file
from core.recipe.recipe_layers import COMMAND_LINE, Layers
from core.recipe.shipped import is_shipped
from core.recipe.trust import check_modules, is_named, is_of_a_run

SMOKE = " (smoke)"
"""What follows the file's name in the origin of keys of its `smoke` section."""


@dataclass
class Sources:
    """The files that a recipe is read from, of which those of runs may name no code unless they are trusted.

    Args:
        trust: whether every file may name code.
        of_a_run: whether the first file is a run's recipe, whatever else its folder holds.
        named: modules that the user has named elsewhere.
        overrides_from: the file that holds the overrides, if that is a sweep's which was made elsewhere.
        overrides_folder: the folder in which files are that overrides name; None: the current one.
        checked: the files to check, by their names as origins of keys.
    """

    trust: bool = False
    of_a_run: bool = False
    named: Collection[str] = ()
    overrides_from: Path | None = None
    overrides_folder: Path | None = None
    checked: dict[str, Path] = field(default_factory=dict)

    def add(self, file: Path, *, of_a_run: bool = False) -> None:
        """Adds a file that was read."""
        if not self.trust and (of_a_run or is_of_a_run(file)):
            self.checked[str(file)] = file

    def add_base(self, base: Path, file: Path) -> None:
        """Adds the file that `file` extends: what a run's recipe chooses is the run's, but for shipped recipes."""
        is_chosen_by_a_run = str(file) in self.checked and not is_shipped(base)
        self.add(base, of_a_run=is_chosen_by_a_run)

    def file_of(self, origin: str) -> Path | None:
        """The file to check that an origin of keys belongs to; None for the user's own."""
        if origin.startswith(COMMAND_LINE):
            return None if self.trust else self.overrides_from
        return self.checked.get(origin)

    def add_smoke(self, file: Path, layers: Layers) -> None:
        """Adds the `smoke` section that a file's recipe has, which may come from the file that it extends."""
        origin = layers.origin("smoke.plugins.0")
        if origin in self.checked:
            self.checked[smoke_of(file)] = self.checked[origin]

    def check_plugins(self, layers: Layers) -> None:
        """Raises `UserError` for a module that would run because a run's recipe, which is not trusted, names it."""
        plugins = layers.values.get("plugins")
        items = plugins if isinstance(plugins, list) else [plugins]
        for index, module in enumerate(items):
            if module is None:
                continue
            origin = layers.origin(f"plugins.{index}")
            name = str(module)
            if "${" in name:
                raise UserError(
                    f"{origin}: plugins: {name!r} must be the name of a module or a file itself"
                )
            file = self.file_of(origin)
            if file is not None and not is_named(name, self.named):
                check_modules(file, "plugins", [name])

    def locate_plugin_files(self, layers: Layers) -> None:
        """Replaces the plugin files that a recipe names, each relative to the file that names it, by whole paths.

        Raises:
            UserError: two of them have the same name.
        """
        plugins = layers.values.get("plugins")
        if not isinstance(plugins, list):
            return
        located: list[Any] = []
        found: dict[str, Path] = {}
        for index, item in enumerate(plugins):
            if not isinstance(item, str) or not is_plugin_file(item) or "${" in item:
                located.append(item)
                continue
            origin = layers.origin(f"plugins.{index}")
            folder = Path(origin.removesuffix(SMOKE)).parent
            if origin.startswith(COMMAND_LINE):
                folder = self.overrides_folder or Path.cwd()
            path = Path(os.path.abspath(folder / item))
            other = found.setdefault(path.name, path)
            if other != path:
                why = f"{other} and {path} have the same name, and a run keeps both in one folder"
                raise UserError(f"{origin}: plugins: {why}")
            located.append(str(path))
        layers.values = {**layers.values, "plugins": located}


def smoke_of(file: Path) -> str:
    """The origin of the keys of a file's `smoke` section."""
    return f"{file}{SMOKE}"
