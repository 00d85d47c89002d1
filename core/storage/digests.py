"""Checksums of files whose format has none: `SHA256SUMS`, which the command `sha256sum -c` reads too.

The file lists the folder's files by relative name. It is written after them, and they are read through once more when
they are used, at about 1 GB/s.
"""

import hashlib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from core.contracts.errors import UserError
from core.storage.documents import read_text
from core.storage.files import is_plain_name, write_text

DIGESTS = "SHA256SUMS"
"""Name of the list of a folder's checksums."""

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class DigestWarning(UserWarning):
    """Files that cannot be checked; the commands print it in one line."""


def write_digests(folder: Path, names: Iterable[str]) -> None:
    """Writes the checksums of some files of a folder, in place of those that it held.

    Args:
        folder: holds the files.
        names: relative to the folder.
    """
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names]
    write_text(folder / DIGESTS, "".join(lines))


def check_digests(folder: Path, name: str) -> None:
    """Compares a file, or all files of a folder, with the checksums that were written with them.

    A folder without checksums was written before there were any; that is one warning. A file that the list lacks is not
    checked.

    Args:
        folder: holds the list.
        name: the file or folder in it to check.

    Raises:
        UserError: a file has changed, or is missing, or the list is damaged.
    """
    if not (folder / DIGESTS).exists():
        why = f"it holds no {DIGESTS}, which was not written at that time"
        warnings.warn(f"{folder}: its files are read unchecked: {why}", DigestWarning, stacklevel=1)
        return
    for listed, expected in _read_digests(folder / DIGESTS).items():
        is_named = listed == name or listed.startswith(f"{name}/")
        if is_named and not _is_unchanged(folder / listed, expected):
            why = f"its checksum is not the one in {DIGESTS}"
            raise UserError(f"{folder / listed}: has changed since it was written: {why}")


def _read_digests(file: Path) -> dict[str, str]:
    """The checksum of each file, by name."""
    found: dict[str, str] = {}
    for line in read_text(file).splitlines():
        match = _LINE.fullmatch(line)
        if match is None or not all(map(is_plain_name, match[2].split("/"))):
            raise UserError(f"{file}: is damaged: {line[:80]!r} is no checksum and file name")
        found[match[2]] = match[1]
    return found


def _is_unchanged(file: Path, expected: str) -> bool:
    if not file.is_file():
        return False
    try:
        return _digest(file) == expected
    except OSError as cause:
        raise UserError(f"{file}: cannot be read: {cause.strerror}") from cause


def _digest(file: Path) -> str:
    """SHA-256 of a file in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
