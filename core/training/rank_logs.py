"""The log of every rank but the first: its stdout and stderr, in a file of its own in the run folder."""

import errno
import os
import socket
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

from core.contracts.errors import UserError
from core.storage.documents import check_regular
from core.training.launchers import Launch

LOGS = "logs"
"""The folder of the logs in a run folder."""

FIRST_STDERR = "MOELOOM_FIRST_STDERR"
"""The environment variable with the descriptor of the first rank's stderr, in rank 1 where the first one starts it."""

QUOTED = 300
"""Most characters that a message quotes of a log's last line."""

TAIL_BYTES = 100_000
"""Bytes at the end of a log in which its last line is looked for."""

_HEADER = "--- "
"""How the line begins that a log has for each start of its rank."""

_kept: list[int] = []
"""The descriptor of the stderr that a task of a launcher had before it was redirected."""


def log_of(folder: Path, rank: int) -> Path:
    """The file with what a rank prints."""
    return folder / LOGS / f"rank-{rank:05d}.log"


def open_log(folder: Path, launch: Launch) -> int:
    """Opens the log of a rank at its end, and writes a line with time, rank and machine.

    Args:
        folder: the run folder; it may be missing.
        launch: the rank.

    Returns:
        The file descriptor.

    Raises:
        UserError: the file cannot be written.
    """
    path = log_of(folder, launch.rank)
    try:
        if path.parent.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "is not a regular file")
    except OSError as cause:
        raise UserError(f"{path}: cannot be written: {cause.strerror}") from cause
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    place = f"node {launch.node} ({socket.gethostname()})"
    os.write(descriptor, f"{_HEADER}{now} rank {launch.rank} of {launch.world}, {place}\n".encode())
    return descriptor


def redirect_output(folder: Path, launch: Launch) -> None:
    """Sends stdout and stderr of a launcher's task to its log, unless it is the first rank or they go there already.

    Args:
        folder: the run folder; it may be missing.
        launch: this process among the ranks.

    Raises:
        UserError: the file cannot be written.
    """
    if launch.rank == 0 or launch.launcher is None or _kept:
        return
    descriptor = open_log(folder, launch)
    _kept.append(os.dup(2))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def write_to_first_stderr(launch: Launch, sentence: str) -> None:
    """Prints a sentence where the first rank would; done by rank 1 alone, because the first one has ended."""
    if launch.rank != 1:
        return
    descriptors = list(_kept)
    given = os.environ.get(FIRST_STDERR, "")
    if launch.parent is not None and given.isdecimal():
        descriptors.append(int(given))
    for descriptor in descriptors:
        with suppress(OSError):
            os.write(descriptor, f"moeloom: {sentence}\n".encode())


def log_hint(folder: Path, rank: int) -> str:
    """The end of a message about a rank: the last line of its log, if it has printed any, and where the log is."""
    path = log_of(folder, rank)
    try:
        check_regular(path)
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = stream.read(TAIL_BYTES).decode("utf-8", "replace")
    except (OSError, UserError):
        return f"; it has no log at {path}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or lines[-1].startswith(_HEADER):
        return f"; its log: {path}"
    line = lines[-1].removeprefix("moeloom: ")
    line = "".join(character if character.isprintable() else " " for character in line)
    if len(line) > QUOTED:
        line = f"{line[:QUOTED]}..."
    return f": {line}; its log: {path}"
