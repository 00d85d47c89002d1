"""Writes files so that a kill never leaves half of one; checks names and links that must not lead out of a folder."""

import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from core.contracts.errors import UserError

LONGEST_NAME = 255
"""Bytes of the longest name of a file."""


def write_text(target: Path, text: str, *, durable: bool = False) -> None:
    """Writes a file under a temporary name and moves it into place.

    A symbolic link at the target is replaced; the file that it names stays as it is.

    Args:
        target: the file.
        text: its content.
        durable: whether the file is forced to the disk before it is moved, and its folder afterwards.

    Raises:
        OSError: it cannot be written, or is a folder.
    """
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, target)
        if durable:
            sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Forces the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Deletes the half-written files that a kill left in a folder; checkpoints among them can be large."""
    for half in folder.glob(".*.tmp"):
        half.unlink(missing_ok=True)


def is_plain_name(value: object) -> bool:
    """Whether a value is the name of a file, without a folder, so that it cannot lead out of one.

    Names with characters that cannot be printed, such as line ends, are not plain either, nor is one that no file can
    have, such as one of 300 characters.
    """
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    if not value.isprintable() or "/" in value or "\\" in value:
        return False
    return len(value.encode("utf-8")) <= LONGEST_NAME


def leads_out_of(link: Path, folder: Path) -> bool:
    """Whether a path leads, through symbolic links, out of a folder."""
    # unlike `Path.resolve`, `realpath` takes links that lead to each other
    return not Path(os.path.realpath(link)).is_relative_to(os.path.realpath(folder))


def check_links(folder: Path) -> None:
    """Checks that no symbolic link in a folder, at any depth, leads out of it.

    Raises:
        UserError: one does.
    """
    for link in _links(folder):
        if leads_out_of(link, folder):
            raise UserError(
                f"{link}: is a symbolic link that leads out of {folder}, to {os.readlink(link)}"
            )


def _links(folder: Path) -> Iterator[Path]:
    """Yields the symbolic links below a folder, none of which is followed."""
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(parent, name)
            if path.is_symlink():
                yield path


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one of its causes, reports that no space is left on the disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
