"""Finds out whether a runner works in a folder: it holds a lock, which the system releases when it is killed."""

import fcntl
import os
from pathlib import Path

HELD = Path("/proc/locks")
"""Linux's list of locks, a line for each: number, kind, ..., process, major:minor:inode of the file, range."""


def is_locked(file: Path) -> bool:
    """Whether some process holds a lock on the file.

    The system's list is read first, because taking a lock to see whether it is free would keep it from a runner that
    starts in that moment. The list lacks the locks of other machines and containers, so a lock that is not in it is
    tried.
    """
    if _is_listed(file):
        return True
    try:
        with file.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_listed(file: Path) -> bool:
    """Whether the system's list names a lock on the file.

    Stacked file systems (device numbers without a driver) give the list another device than they give the file, so
    there the number of the file decides alone.
    """
    try:
        known = file.stat()
        rows = [line.split() for line in HELD.read_text(encoding="ascii").splitlines()]
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
