"""Locks: one holder at a time, none after its death, and finding out about a holder without disturbing it."""

import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from core.contracts.errors import UserError
from core.storage import lock
from core.storage.lock import AlreadyLocked, hold, is_locked, locked_folder


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


@pytest.mark.parametrize(("major", "is_listed"), [(0, True), (8, False)])
def test_the_devices_number_counts_unless_the_file_system_is_an_overlay(
    major: int, is_listed: bool, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock is listed on the file's inode of another device; an overlay's files have the major number 0."""
    listed = tmp_path / "locks"
    listed.write_text(line(file, device="fe:99"))
    monkeypatch.setattr(lock, "SYSTEM_LOCKS", listed)
    monkeypatch.setattr(lock.os, "major", lambda device: major)
    assert lock.is_locked(file) == is_listed


@contextmanager
def another_holder(file: Path) -> Iterator[int]:
    """A forked process that holds a lock; yields its process id, and kills it at the end."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with hold(file):
                os.write(tell, b"x")
                time.sleep(60)
        finally:
            os._exit(1)  # whatever was raised: the tests go on in the parent alone
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"x", "the forked process could not take the lock"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)


def test_a_lock_has_one_holder_which_is_named_and_frees_it_by_dying(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with another_holder(file) as pid:
        assert is_locked(file)
        with pytest.raises(AlreadyLocked) as found, hold(file):
            pass
        assert found.value.holder == f"process {pid}"
        assert found.value.since[:2] == "20"
    assert file.exists()  # it was killed
    assert not is_locked(file)
    with hold(file):
        assert is_locked(file)
    assert not file.exists()


def _count(file: Path, counter: Path, times: int) -> None:
    for _ in range(times):
        with hold(file, waiting=lambda holder: None):
            number = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(number + 1))


def test_no_two_processes_hold_a_lock_whose_file_is_removed_each_time(tmp_path: Path) -> None:
    """A holder removes the file, so a process that waited must not trust a lock on the removed one."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    arguments = (tmp_path / ".lock", counter, 40)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_count, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert counter.read_text() == "120"


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/.lock").symlink_to(mine)
    with (
        pytest.raises(UserError, match="cannot be written: Too many levels of symbolic links"),
        locked_folder(tmp_path / "folder", "run"),
    ):
        pass
    assert mine.read_text() == "mine"


def test_another_name_of_a_file_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").hardlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="Too many links"), hold(tmp_path / ".lock"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_lock_in_the_place_of_a_moved_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with hold(tmp_path / "run/.lock"):
        (tmp_path / "run").rename(tmp_path / "old")
        (tmp_path / "run").mkdir()
        with another_holder(tmp_path / "run/.lock") as pid:
            assert is_locked(tmp_path / "run/.lock")
            os.kill(pid, 0)
            second = tmp_path / "run/.lock"
            assert second.exists()
    assert second.exists()  # that holder was killed; the first one did not remove its file


def test_a_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    ready, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            with hold(file):
                child = os.fork()
                if child:
                    os.write(tell, f"{child}\n".encode())
                time.sleep(60)
        finally:
            os._exit(1)  # whatever was raised: the tests go on in the first process alone
    os.close(tell)
    child = 0
    try:
        child = int(os.read(ready, 20))
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        with hold(file):
            pass
    finally:
        os.close(ready)
        for pid in (parent, child):
            with suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with (
        pytest.warns(lock.LockWarning, match="this file system has no locks"),
        hold(tmp_path / ".lock"),
    ):
        pass


def test_a_start_that_fails_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    for there in ("a", "a/b/c"):
        with (
            pytest.raises(UserError, match=r"^cannot start$"),
            locked_folder(tmp_path / "a/b/c", "run"),
        ):
            raise UserError("cannot start")
        assert list(tmp_path.iterdir()) == ([] if there == "a" else [tmp_path / "a"])
        (tmp_path / "a/b/c").mkdir(parents=True, exist_ok=True)
    (tmp_path / "a/b/c/file").touch()
    with (
        pytest.raises(UserError, match=r"^cannot start$"),
        locked_folder(tmp_path / "a/b/c", "run"),
    ):
        raise UserError("cannot start")
    assert (tmp_path / "a/b/c/file").exists()
