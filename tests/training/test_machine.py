"""The record of a run's code and machine, and what is recorded where they cannot be determined."""

import subprocess
from pathlib import Path

import pytest
import torch

from core.training import machine


def git(folder: Path, *arguments: str) -> str:
    """Runs git in a folder; returns its output."""
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one file, one commit and a tag, used as the folder of the code."""
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "one")
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    return tmp_path


def test_the_commit_is_reported_and_whether_something_has_changed(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert machine.code() == {"commit": commit, "dirty": False}
    (checkout / "unknown").write_text("to git")
    assert machine.code() == {"commit": commit, "dirty": False}
    (checkout / "file").write_text("2")
    assert machine.code() == {"commit": commit, "dirty": True}


def test_another_repository_in_the_environment_is_not_taken_for_ours(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert machine.code()["commit"] is not None


def test_without_git_or_a_checkout_nothing_is_reported(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(checkout / "nowhere"))
    assert machine.code() == unknown
    monkeypatch.undo()
    monkeypatch.setattr(machine, "CHECKOUT", checkout / "installed")
    assert machine.code() == unknown


def test_a_repository_without_a_commit_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert machine.code() == {"commit": None, "dirty": None}


def test_the_processor_has_its_name_or_at_least_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nmodel name\t: A: fast one\n\nprocessor\t: 1\nmodel name\t: A: fast one\n"
    )
    monkeypatch.setattr(machine, "CPU_INFO", file)
    assert machine.machine()["cpu"] == "A: fast one"
    file.write_text("processor\t: 0\nBogoMIPS\t: 50\n")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.machine()["cpu"] == "aarch64"
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "none")
    assert machine.machine()["cpu"] == "aarch64"


def test_gpus_are_named_and_one_that_cannot_be_asked_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert machine.machine()["gpus"] == ["GPU 0", "GPU 1"]

    def broken(_: int) -> str:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    assert machine.machine()["gpus"] == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.machine()["gpus"] == []
