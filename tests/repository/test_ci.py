"""The script of the continuous integration runs the commands of the README, locally and on GitHub."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from .documents import ROOT
from .test_readme import COMMANDS

SCRIPT = ROOT / ".ci" / "run"
STUB = """#!/usr/bin/env bash
# Stands for python, pip and make: writes down its call, and makes a virtual environment of itself.
echo "$(basename "$0") $*" >> "$CALLS"
if [[ "$1 $2" == "-m venv" ]]; then
    mkdir -p "$3/bin"
    for tool in python pip make pytest; do cp "$0" "$3/bin/$tool"; done
fi
if [[ "$1" == wheel ]]; then touch "$4/some.whl"; fi
if [[ "$*" == *"${FAIL_AT:-nothing}"* ]]; then exit 3; fi
if [[ "$*" == *--out* ]]; then mkdir -p "${!#}" && echo {} > "${!#}/summary.json"; fi
"""


class Ci:
    """Runs the script beside a README of the test, with stubs in place of all tools.

    Args:
        folder: receives all files.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.calls = folder / "calls"
        tools = folder / "tools"
        (self.root / ".ci").mkdir(parents=True)
        (self.root / ".ci" / "run").write_bytes(SCRIPT.read_bytes())
        (self.root / ".ci" / "run").chmod(0o755)
        example = self.root / "examples" / "moeloom-cosine-router"
        (example / "tests").mkdir(parents=True)
        (example / "README.md").write_text(
            "# Example\n\n```sh\npytest --kit\npython train.py example\n```\n"
        )
        (example / "one.yaml").write_text("seed: 0\n")
        for name in (
            "pyproject.toml",
            "setup.py",
            "LICENSE",
            "core",
            "moeloom",
            "plugins",
            "recipes",
        ):
            (self.root / name).write_text("")
        tools.mkdir()
        for name in ("python3", "apt-get", "chromium", "chromedriver"):
            (tools / name).write_text(STUB)
            (tools / name).chmod(0o755)
        (folder / "tmp").mkdir()
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        self.environment = {
            "PATH": path,
            "CALLS": str(self.calls),
            "TMPDIR": str(folder / "tmp"),
            "HOME": str(folder),
        }
        self.left = folder / "tmp"

    def __call__(self, readme: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.root / "README.md").write_text(readme, encoding="utf-8")
        command = [str(self.root / ".ci" / "run")]
        env = {**self.environment, **environment}
        return subprocess.run(
            command, cwd="/", env=env, capture_output=True, text=True, timeout=30, check=False
        )

    def calls_made(self) -> list[str]:
        """The calls of tools, in order."""
        return self.calls.read_text().splitlines()


@pytest.fixture
def ci(tmp_path: Path) -> Ci:
    return Ci(tmp_path)


def readme(train: str, test: str) -> str:
    return f"# Title\n\nText.\n\n```sh\n{train}\n{test}\n```\n\n```sh\nnever\n```\n"


def test_the_script_is_executable_and_has_neither_command_in_it() -> None:
    assert os.access(SCRIPT, os.X_OK)
    text = SCRIPT.read_text(encoding="utf-8")
    for command in COMMANDS:
        assert command not in text
    assert "core.fit" not in text


def test_every_command_comes_from_a_readme_and_both_tiers_run(ci: Ci) -> None:
    done = ci(readme("python train.py recipe", "pip install some && pytest -k this"))
    assert done.returncode == 0, done.stdout + done.stderr
    calls = ci.calls_made()
    for command in (
        "make lint",
        "pip install some",
        "pytest -k this",
        "pytest -m full",
        "pytest --kit",
    ):
        assert command in calls
    fits = [call.split() for call in calls if call.startswith("python train.py ")]
    assert [fit[1:3] for fit in fits] == [["train.py", "recipe"], ["train.py", "example"]]
    assert all("budget.steps=20" in fit for fit in fits)
    assert "never" not in " ".join(calls)


def test_linters_come_before_every_test(ci: Ci) -> None:
    ci(readme("python train", "pytest -k this"), FAIL_AT="lint")
    assert not [call for call in ci.calls_made() if call.startswith("pytest")]


def test_the_lowest_torch_that_is_allowed_has_a_constraint_and_an_entry_in_the_workflow() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = [line for line in project["dependencies"] if line.startswith("torch>=")]
    lowest = torch.removeprefix("torch>=").partition(",")[0]
    assert (ROOT / ".ci/lowest.txt").read_text(encoding="utf-8") == f"torch=={lowest}.*\n"
    assert ".ci/lowest.txt" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_each_stage_says_its_name_and_seconds_and_nothing_is_left(ci: Ci) -> None:
    done = ci(readme("python train", "pytest"))
    lines = done.stdout.splitlines()
    stages = [
        line.removeprefix("ci: ").removesuffix(" ...") for line in lines if line.endswith(" ...")
    ]
    assert {"linters", "fit", "tests", "full tests", "example"} <= set(stages)
    for stage in stages:
        assert any(line.startswith(f"ci: {stage} took ") and line.endswith(" s") for line in lines)
    assert lines[-1].startswith("ci: passed in ")
    assert list(ci.left.iterdir()) == []


@pytest.mark.parametrize(
    ("fail_at", "stage"),
    [
        ("-m venv", "environment"),
        ("-k this", "tests"),
        ("-m full", "full tests"),
        ("lint", "linters"),
        ("train recipe", "fit"),
        ("--kit", "example"),
    ],
)
def test_a_stage_that_fails_ends_it(ci: Ci, fail_at: str, stage: str) -> None:
    done = ci(readme("python train recipe", "pytest -k this"), FAIL_AT=fail_at)
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1].startswith(f"ci: failed in stage {stage} after ")
    assert list(ci.left.iterdir()) == []


def test_a_readme_with_another_number_of_commands_is_refused(ci: Ci) -> None:
    done = ci(readme("one\ntwo", "three"))
    assert done.returncode == 1
    assert "must hold two commands, not 3" in done.stderr


def test_the_workflow_only_calls_the_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu")
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_check_is_format_lint_types_contracts_and_tests() -> None:
    make = ["make", "--dry-run", "--no-print-directory", "check"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    linters = ["ruff format --check .", "ruff check .", "mypy", "lint-imports --no-logo"]
    assert done.stdout.splitlines() == [*linters, "pytest"]


def test_the_hooks_download_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for repo in config["repos"] for hook in repo["hooks"]} == {"system"}


def test_the_extras_are_those_that_the_documents_promise() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"fp8", "hf", "eval", "report", "ray", "test", "dev"} <= set(
        project["optional-dependencies"]
    )
