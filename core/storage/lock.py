"""Locks: one process at a time works in a folder, and the system releases the lock of a process that has ended.

A lock is a file on which its holder has called `flock`. The file names the holder for error messages; only the
system's lock counts, so a file that a killed process left locks nothing.
"""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from core.contracts.errors import UserError
from core.storage.documents import parse_object

LOCK = ".lock"
"""Name of the lock file of a folder."""

SYSTEM_LOCKS = Path("/proc/locks")
"""Linux's list of locks, a line for each: number, kind, ..., process, major:minor:inode of the file, range."""

RETRY_DELAYS = (0.1, 0.2, 0.0)
"""Delays between attempts, because `is_locked` in another process may briefly take a lock that is free; in seconds."""

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of a file system that has no locks."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


class LockWarning(UserWarning):
    """A file system without locks; the commands print it in one line."""


class AlreadyLocked(UserError):  # noqa: N818
    """Another process holds a lock.

    Args:
        holder: that process, for an error message.
        since: when it took the lock; empty if that is not known.
    """

    def __init__(self, holder: str, since: str) -> None:
        super().__init__(f"{holder} holds the lock")
        self.holder = holder
        self.since = since


@contextmanager
def hold(file: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds a lock, and removes its file at the end.

    Args:
        file: the lock's file; its folder must exist.
        waiting: called with the holder where another process has the lock, which is then waited for. None: such a lock
            is an error.

    Raises:
        AlreadyLocked: another process holds the lock.
        OSError: the file cannot be made, or is a link.
    """
    descriptor = _acquire(file, waiting)
    _held.add(descriptor)
    try:
        _write_holder(descriptor)
        yield
    finally:
        with suppress(OSError):
            # the folder may have been moved, and another one made in its place
            if _is_at(descriptor, file):
                file.unlink()
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _close_in_child() -> None:
    """Closes the locks of the parent in a forked process, which would keep them when the parent has ended."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked_folder(
    folder: Path, what: str, *, where: str = "--out", is_new: bool = False
) -> Iterator[None]:
    """Makes a folder and holds its lock, so that one process at a time works in it.

    After a `UserError`, the folders that were made and are still empty are removed.

    Args:
        folder: the folder to lock.
        what: works in the folder, in the error message about a lock that is held: "run".
        where: the option that named the folder, with which error messages begin.
        is_new: whether the folder was made for this work just before.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    made: list[Path] = []
    with ExitStack() as stack:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            if is_new:
                made = [folder]
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(folder / LOCK))
        except AlreadyLocked as cause:
            since = f" since {cause.since}" if cause.since else ""
            who = f"another {what} ({cause.holder})"
            raise UserError(f"{where} {folder}: {who} works in this folder{since}") from cause
        except OSError as cause:
            raise UserError(f"{where} {folder}: cannot be written: {cause.strerror}") from cause
        try:
            yield
        except UserError:
            stack.close()
            for path in made:
                with suppress(OSError):
                    path.rmdir()
            raise


def _acquire(file: Path, waiting: Callable[[str], None] | None) -> int:
    """Returns a descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            # a hard link is another name of a file, which would be overwritten
            if os.fstat(descriptor).st_nlink > 1:
                raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
            if not _try_lock(descriptor, file):
                holder, since = _holder(descriptor)
                if waiting is None:
                    raise AlreadyLocked(holder, since)
                waiting(holder)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, file):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # the holder before removed the file, and the next one may lock a new file
        os.close(descriptor)


def _try_lock(descriptor: int, file: Path) -> bool:
    """Tries a few times to lock a file; on a file system without locks it warns, and goes on unlocked."""
    for delay in RETRY_DELAYS:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(delay)
        except OSError as cause:
            if cause.errno not in _UNSUPPORTED:
                raise
            why = "two processes that work in this folder at once are not noticed"
            warnings.warn(
                f"{file}: this file system has no locks: {why}", LockWarning, stacklevel=1
            )
            return True
        else:
            return True
    return False


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    """Names this process in the lock file; a full disk does not matter, because the system's lock is what counts."""
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)


def _holder(descriptor: int) -> tuple[str, str]:
    """The process that the lock file names, and when it took the lock; the time is empty if that is not known."""
    try:
        holder = parse_object(os.pread(descriptor, 65536, 0), Path(LOCK))
        name = f"process {int(holder['process'])}"
        if holder["host"] != socket.gethostname():
            name += f" on {holder['host']}"
        return name, str(holder["since"])
    except (OSError, UserError, ValueError, KeyError, TypeError, OverflowError):
        return "another process", ""


def is_locked(file: Path) -> bool:
    """Whether some process holds a lock on the file.

    The system's list is read first, because taking a lock to see whether it is free would keep it from a process that
    starts in that moment. The list lacks the locks of other machines and containers, so a lock that is not in it is
    tried.
    """
    if _is_listed(file):
        return True
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _is_listed(file: Path) -> bool:
    """Whether the system's list names a lock on the file.

    On overlay file systems (their major device number is 0) /proc/locks shows another device number than stat(), so
    only the inode is compared.
    """
    try:
        known = file.stat()
        rows = [line.split() for line in SYSTEM_LOCKS.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return False
    device = f"{os.major(known.st_dev):02x}:{os.minor(known.st_dev):02x}"
    any_device = os.major(known.st_dev) == 0
    for row in rows:
        if len(row) > 5 and row[1] == "FLOCK":
            where, _, number = row[5].rpartition(":")
            if number == str(known.st_ino) and (any_device or where == device):
                return True
    return False
