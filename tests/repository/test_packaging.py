"""The content of a wheel, and that it works outside of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import core

from .documents import ROOT

BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"
FROM_ELSEWHERE = """
import json, sys
import core
import moeloom
from core.extension.loader import find_plugins
from core.recipe.compose import compose
from core.recipe.shipped import shipped_recipes, shipped_sweeps
owners = find_plugins()
print(json.dumps({
    "core": core.__file__,
    "moeloom": moeloom.__file__,
    "version": moeloom.__version__,
    "recipes": sorted([*shipped_recipes(), *(f"sweeps/{name}" for name in shipped_sweeps())]),
    "owners": sorted({(owner.distribution, owner.version) for owner in owners}),
    "points": sorted(owner.entry_point for owner in owners),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that setuptools builds from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("core", "moeloom", "plugins", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-W", "ignore", "-c", BUILD]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def relative(folder: Path, pattern: str) -> set[str]:
    """The paths of the files that match in a folder of the checkout, relative to it."""
    return {
        str(file.relative_to(folder))
        for file in folder.rglob(pattern)
        if "__pycache__" not in file.parts
    }


def test_a_wheel_holds_the_code_the_recipes_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name == f"moeloom-{core.__version__}-py3-none-any.whl"
    for package in ("core", "moeloom", "plugins"):
        code = {f"{package}/{name}" for name in relative(ROOT / package, "*.py")}
        assert {
            name for name in names if name.startswith(f"{package}/") and name.endswith(".py")
        } == code
    recipes = {f"core/recipes/{name}" for name in relative(ROOT / "recipes", "*.yaml")}
    clusters = {f"core/{name}" for name in relative(ROOT / "core", "*.yaml")}
    assert clusters
    assert {name for name in names if name.endswith(".yaml")} == recipes | clusters
    assert {"core/cluster/page.html", "core/cluster/page.css", "core/cluster/page.js"} <= names
    assert {
        "core/py.typed",
        "plugins/mla/README.md",
        "core/authoring/skeletons/router.py.txt",
    } <= names
    assert any(re.fullmatch(r"moeloom-[\d.]+\.dist-info/licenses/LICENSE", name) for name in names)
    assert not any(name.startswith(("tests/", "docs/", "recipes/")) for name in names)


def test_a_wheel_installs_the_command(wheel: Path) -> None:
    name = f"moeloom-{core.__version__}.dist-info/entry_points.txt"
    points = ConfigParser(delimiters=("=",))
    points.read_string(zipfile.ZipFile(wheel).read(name).decode("utf-8"))
    assert dict(points["console_scripts"]) == {"moeloom": "moeloom.__main__:main"}


def test_it_works_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", FROM_ELSEWHERE]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["core"] == str(tmp_path / "site/core/__init__.py")
    assert found["moeloom"] == str(tmp_path / "site/moeloom/__init__.py")
    assert found["version"] == core.__version__
    assert found["recipes"] == sorted(
        name.removesuffix(".yaml") for name in relative(ROOT / "recipes", "*.yaml")
    )
    assert found["owners"] == [["moeloom", core.__version__]]
    packages = {file.parent.name for file in (ROOT / "plugins").glob("*/__init__.py")}
    assert set(found["points"]) == packages
