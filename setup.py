"""Everything is said in pyproject.toml, but for one thing: a wheel holds recipes/ as core/recipes/.

In a checkout and in an editable install the recipes are read where they are.
"""

from pathlib import Path
from shutil import copy

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = sorted(Path("recipes").rglob("*.yaml"))


class BuildWithRecipes(build_py):
    """Copies the recipes beside the modules."""

    def run(self) -> None:
        super().run()
        for file in [] if self.editable_mode else RECIPES:
            target = Path(self.build_lib, "core", file)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy(file, target)

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold so that a wheel can be built from it."""
        return [*super().get_source_files(), *map(str, RECIPES)]


setup(cmdclass={"build_py": BuildWithRecipes})
