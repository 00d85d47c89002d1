"""The comparison of two commits, run on clones of this repository: equal to itself, and a changed rounding is found."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from same_bits import parser
from tiers import TESTS

ROOT = TESTS.parent
NORM = "normed: Tensor = (x * scale).mul_(weight_D)"
OTHER_ROUNDING = "normed: Tensor = (x * weight_D).mul_(scale)"


def git(folder: Path, *arguments: str) -> None:
    """Runs git in a folder, with an identity for machines that have none."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository of one commit that holds the working tree's files."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("core", "plugins", "recipes", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "base")
    return folder


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(folder / "tools" / "same_bits.py"),
        "HEAD",
        "--steps",
        "4",
        *arguments,
    ]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.full
def test_a_commit_equals_itself_and_a_changed_rounding_is_found(clone: Path) -> None:
    cases = ("--only", "dsv3_small", "--only", "precision/te_fp8")
    same = compare(clone, *cases)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "precision/te_fp8: does not run here" in same.stdout
    assert same.stdout.splitlines()[-1].endswith("the same bits")
    assert list((clone / ".git").glob("worktrees/*")) == []
    (norm,) = (clone / "core").rglob("norm.py")
    text = norm.read_text(encoding="utf-8")
    assert NORM in text
    norm.write_text(text.replace(NORM, OTHER_ROUNDING), encoding="utf-8")
    changed = compare(clone, *cases)
    assert changed.returncode == 1, changed.stdout + changed.stderr
    assert "dsv3_small DIFFERS" in changed.stdout
    assert "metrics.csv: step " in changed.stdout


def test_misuse_is_one_sentence_and_exit_code_2() -> None:
    for arguments, word in (
        (["no-such-commit"], "no such commit"),
        (["HEAD", "--steps", "3"], "even number"),
    ):
        command = [sys.executable, str(ROOT / "tools" / "same_bits.py"), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert word in done.stderr
        assert "Traceback" not in done.stderr
    assert parser().parse_args(["HEAD"]).steps == 20
