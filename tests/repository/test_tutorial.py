"""The tutorial builds the example package: it has the same files, and they work."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from lab import write_texts

from .documents import ROOT, blocks

TUTORIAL = ROOT / "docs" / "tutorial.md"
EXAMPLE = ROOT / "examples" / "moeloom-cosine-router"
INSTALLED = any(point.value == "core.testing.plugin" for point in entry_points(group="pytest11"))
KIT = (
    *(() if INSTALLED else ("-p", "core.testing.plugin")),
    "--moeloom-plugin",
    "moeloom_cosine_router",
)


def written(folder: Path) -> list[str]:
    """Writes every block that begins with the name of a file into a folder; returns the names."""
    names = []
    for block in blocks(TUTORIAL):
        if named := re.match(r"# ([\w/.]+\.\w+)$", block.lines[0]):
            file = folder / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(block.lines[1:]) + "\n", encoding="utf-8")
            names.append(named[1])
    return names


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the tutorial, installed by writing its metadata beside the module."""
    folder = tmp_path_factory.mktemp("tutorial")
    written(folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / "moeloom_cosine_router-1.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["moeloom.plugins"]
    lines = ["[moeloom.plugins]", *(f"{name} = {module}" for name, module in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def python(package: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the folder of the package, where moeloom and the package can be imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{package}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    environment |= variables
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_tutorials_files_are_the_examples(tmp_path: Path) -> None:
    names = written(tmp_path)
    beside = {"README.md"}
    files = {
        file for file in EXAMPLE.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    }
    assert {str(file.relative_to(EXAMPLE)) for file in files if ".egg-info" not in str(file)} == {
        *names,
        *beside,
    }
    for name in names:
        assert (tmp_path / name).read_text() == (EXAMPLE / name).read_text(), name


def test_it_passes_the_kit_and_its_own_tests(package: Path) -> None:
    done = python(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", *KIT, "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout)


def test_the_kit_detects_the_error_that_the_tutorial_suggests(
    package: Path, tmp_path: Path
) -> None:
    """A package that lacks the autocast line breaks a clause."""
    broken = tmp_path / "moeloom_cosine_router"
    broken.mkdir()
    for file in (package / "moeloom_cosine_router").glob("*.py"):
        text = file.read_text().replace(
            "with torch.autocast(x_TD.device.type, enabled=False):", "if True:"
        )
        (broken / file.name).write_text(text)
    done = python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *KIT)
    assert done.returncode == 1, done.stdout
    assert "autocast changes" in done.stdout
    assert "1 failed" in done.stdout


def test_its_commands_work(package: Path) -> None:
    shown = python(package, "-m", "core.catalog", "show", "router", "cosine")
    assert shown.returncode == 0, shown.stderr
    assert "temperature" in shown.stdout
    compared = python(
        package, "-m", "core.describe", "--compare", "dsv3_small", "cosine_small.yaml"
    )
    assert compared.returncode == 0, compared.stderr
    assert "cosine_small" in compared.stdout
    printed = {line for block in blocks(TUTORIAL, "sh") for line in block.lines}
    assert {
        "python -m core.catalog show router cosine",
        "python -m core.fit cosine_small.yaml",
    } <= printed


def test_its_recipe_trains_when_the_package_is_installed(package: Path, tmp_path: Path) -> None:
    """The tutorial's last command, on a few documents and for two steps."""
    write_texts(tmp_path / "texts", count=40, words=60)
    small = [
        f"data.corpus={{name: files, paths: [{tmp_path}/texts/*.txt]}}",
        "data.tokenizer.vocab=300",
        "data.sequence_length=64",
        "model.dim=32",
        "batch.sequences=2",
        "budget.steps=2",
        "trainer.enable_progress_bar=false",
    ]
    command = [
        "-m",
        "core.fit",
        "cosine_small.yaml",
        *small,
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    done = python(package, *command, MOELOOM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val_loss"] > 0
    used = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))
    (router,) = [plugin for plugin in used["components"] if plugin["name"] == "cosine"]
    assert (router["distribution"], router["version"]) == ("moeloom-cosine-router", "1.0.0")
    assert len((tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()) > 2
