"""Whether a runner is at work in a folder: it holds a lock, and one that was killed holds nothing."""

import fcntl
import os
from pathlib import Path

HELD = Path("/proc/locks")
"""Linux's list of locks, a line for each: number, kind, ..., process, major:minor:inode of the file, range."""


def is_locked(file: Path) -> bool:
    """Whether some process holds a lock on the file.

    The system's list is read first, because who takes a lock to see whether it is free keeps it from a runner that
    starts in that moment. The list lacks what other machines and containers hold, so what it does not name is tried.
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
    """Stacked file systems (device numbers without a driver) give the list another device than they give the file."""
    try:
        known = file.stat()
        rows = [line.split() for line in HELD.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return False
    device, number = f"{os.major(known.st_dev):02x}:{os.minor(known.st_dev):02x}", str(known.st_ino)
    held = [row[5].rpartition(":") for row in rows if len(row) > 5 and row[1] == "FLOCK"]
    return any(n == number and (where == device or not os.major(known.st_dev)) for where, _, n in held)
