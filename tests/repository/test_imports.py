"""The import contracts are kept, cover all packages, and detect violations."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from .documents import ROOT, commands

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = PYPROJECT["tool"]["importlinter"]["contracts"]
BY_NAME = {contract["name"]: contract for contract in CONTRACTS}
ALLOWED = {"core.contracts", "core.model", "core.routing", "core.numerics", "core.extension"}
"""Packages that a plugin may import; of `core.extension` only `hookspec`."""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs import-linter on the packages of a folder."""
    command = shutil.which("lint-imports", path=sysconfig.get_path("scripts"))
    if command is None:
        pytest.skip("import-linter is not installed beside this Python")
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    options = [command, "--no-logo", "--no-cache"]
    return subprocess.run(
        options,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages and the contracts, in which tests break the contracts."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in ("core", "moeloom", "plugins"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.md")
        )
    return folder


def test_every_contract_is_kept(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in done.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    ("where", "line", "contract"),
    [
        ("core/model/late.py", "import plugins.mla.attention", "The core knows no plugin"),
        ("core/model/late.py", "import core.training.load", "Layers: imports only point down"),
        ("core/routing/late.py", "import core.model.norm", "Layers: imports only point down"),
        ("core/model/late.py", "import core.routing.gating", "Layers: imports only point down"),
        ("core/numerics/late.py", "import core.routing.gating", "Layers: imports only point down"),
        ("core/contracts/late.py", "import core.model.norm", "Layers: imports only point down"),
        ("core/recipe/late.py", "import core.model.norm", "Layers: imports only point down"),
        ("core/new_package.py", "", "Layers: imports only point down"),
        (
            "core/training/late.py",
            "import core.analysis.describe",
            "Layers: imports only point down",
        ),
        ("core/evaluate.py", "import core.describe", "Layers: imports only point down"),
        ("plugins/mtp/late.py", "import plugins.mla.attention", "Plugins do not know each other"),
        (
            "plugins/mtp/late.py",
            "import core.run",
            "Plugins stand on contracts, model code and the hookspec",
        ),
        (
            "plugins/mtp/late.py",
            "import core.data.batch",
            "Plugins stand on contracts, model code and the hookspec",
        ),
        (
            "core/recipe/late.py",
            "import torch",
            "Reading a recipe and finding plugins cost no torch",
        ),
    ],
)
def test_a_contract_detects_a_violation(copy: Path, where: str, line: str, contract: str) -> None:
    changed = copy / where
    before = changed.read_bytes() if changed.exists() else None
    changed.write_text(f"def later():\n    {line or 'pass'}\n", encoding="utf-8")
    try:
        done = lint(copy)
    finally:
        changed.unlink() if before is None else changed.write_bytes(before)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in " ".join(done.stdout.split())


def test_a_corpus_may_read_the_data_package(copy: Path) -> None:
    late = copy / "plugins/text_files/late.py"
    late.write_text("import core.data.cache\n", encoding="utf-8")
    try:
        assert lint(copy).returncode == 0
    finally:
        late.unlink()


def test_no_package_of_the_core_is_open_to_plugins_by_oversight() -> None:
    forbidden = set(
        BY_NAME["Plugins stand on contracts, model code and the hookspec"]["forbidden_modules"]
    )
    files = {file.stem for file in (ROOT / "core").glob("*.py")} - {"__init__"}
    folders = {file.parent.name for file in (ROOT / "core").glob("*/__init__.py")}
    packages = {f"core.{name}" for name in files | folders} - ALLOWED
    inner = {f"core.extension.{file.stem}" for file in (ROOT / "core/extension").glob("*.py")}
    assert packages | inner - {"core.extension.__init__", "core.extension.hookspec"} == forbidden


def test_every_command_leaves_torch_to_the_packages() -> None:
    assert set(BY_NAME["Commands leave torch to the packages below"]["source_modules"]) == {
        f"core.{name}" for name in commands()
    }


def imported_packages(source: str) -> set[str]:
    """The packages that a file imports anywhere, without those of Python and ours."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named.add(node.module)
    ours = {*sys.stdlib_module_names, *PYPROJECT["tool"]["mypy"]["packages"]}
    return {name.partition(".")[0] for name in named} - ours


def test_mypy_needs_only_packages_that_the_linters_environment_has() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    required = [*PYPROJECT["project"]["dependencies"], *extras["lint"]]
    there = {re.split(r"[^\w-]", line)[0].lower().replace("pyyaml", "yaml") for line in required}
    there.add("markupsafe")  # a dependency of torch's jinja2
    there |= {
        module.removesuffix(".*")
        for override in PYPROJECT["tool"]["mypy"]["overrides"]
        if override.get("ignore_missing_imports")
        for module in override["module"]
    }
    for package in PYPROJECT["tool"]["mypy"]["packages"]:
        for file in (ROOT / package).rglob("*.py"):
            missing = imported_packages(file.read_text(encoding="utf-8")) - there
            assert not missing, f"{file}: add {missing} to the overrides of mypy"
