"""Finding out whether a runner works in a folder, without disturbing it."""

import fcntl
import os
from pathlib import Path

import pytest

from core.storage import lock


def line(file: Path, kind: str = "FLOCK", device: str | None = None) -> str:
    """The line with which Linux lists a lock (proc_locks(5))."""
    known = file.stat()
    where = device or f"{os.major(known.st_dev):02x}:{os.minor(known.st_dev):02x}"
    return f"1: {kind}  ADVISORY  WRITE 4711 {where}:{known.st_ino} 0 EOF\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A lock file that no process holds."""
    (tmp_path / ".lock").write_text("")
    return tmp_path / ".lock"


def test_a_lock_is_seen_while_it_is_held(file: Path) -> None:
    assert not lock.is_locked(file.with_name("none"))
    assert not lock.is_locked(file)
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert lock.is_locked(file)
    assert not lock.is_locked(file)


def test_a_listed_lock_is_never_touched(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "locks"
    listed.write_text(f"7: POSIX  ADVISORY  READ 1 00:01:1 0 0\n{line(file)}")
    monkeypatch.setattr(lock, "SYSTEM_LOCKS", listed)
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: pytest.fail("the lock was taken"))
    assert lock.is_locked(file)


@pytest.mark.parametrize("kind", ["POSIX", "-> FLOCK", "no line of that kind"])
def test_a_list_that_names_no_holder_leaves_it_to_the_lock(
    kind: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "locks"
    listed.write_text(line(file, kind))
    monkeypatch.setattr(lock, "SYSTEM_LOCKS", listed)
    assert not lock.is_locked(file)
    monkeypatch.setattr(lock, "SYSTEM_LOCKS", tmp_path / "none")
    assert not lock.is_locked(file)


def test_another_devices_file_of_that_number_is_another_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "locks"
    listed.write_text(line(file, device="fe:99"))
    monkeypatch.setattr(lock, "SYSTEM_LOCKS", listed)
    assert lock.is_locked(file) == (os.major(file.stat().st_dev) == 0)
