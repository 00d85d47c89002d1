"""Checksums of files whose format has none: `SHA256SUMS`, which the command `sha256sum -c` reads too.

The file lists the folder's files by relative name. It is written after them, and they are read through once more when
they are used, at about 1 GB/s.
"""

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
    _write(folder, {name: digest_of(folder / name) for name in names})


def _write(folder: Path, checksums: Mapping[str, str]) -> None:
    for name in checksums:
        assert all(map(is_plain_name, name.split("/"))), f"{name!r} cannot be in {DIGESTS}"
    lines = [f"{checksum}  {name}\n" for name, checksum in checksums.items()]
    write_text(folder / DIGESTS, "".join(lines))


def check_digests(folder: Path, name: str) -> None:
    """Compares a file, or all files of a folder, with the checksums that were written with them.

    A folder without checksums was written before there were any; that is one warning.

    Args:
        folder: holds the list.
        name: the file or folder in it to check.

    Raises:
        UserError: a file has changed, is missing, or is not in the list, or the list is damaged.
    """
    if not (folder / DIGESTS).exists():
        why = f"{DIGESTS} is missing (written by an older version), so the files are not verified"
        warnings.warn(f"{folder}: {why}", DigestWarning, stacklevel=1)
        return
    checksums = _read_digests(folder / DIGESTS)
    for listed, expected in checksums.items():
        is_named = listed == name or listed.startswith(f"{name}/")
        if is_named and not _is_unchanged(folder / listed, expected):
            why = f"its checksum is not the one in {DIGESTS}"
            raise UserError(f"{folder / listed}: has changed since it was written: {why}")
    for file in _files_of(folder / name):
        if str(file.relative_to(folder)) not in checksums:
            how = "restore that list, or remove it to use the files unverified"
            raise UserError(f"{file}: is not listed in {folder / DIGESTS}: {how}")


def _files_of(path: Path) -> Iterator[Path]:
    """Yields a file, or the files in a folder; links are left out, because they are no part of what was written."""
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in candidates:
        if file.is_file() and not file.is_symlink():
            yield file


def set_digest(folder: Path, name: str, content: bytes) -> None:
    """Adds the checksum of a file that is about to be written to the list, or replaces it.

    A folder without a list was written before there were any, and gets none: its other files would not be in it.

    Args:
        folder: holds the list.
        name: the file's.
        content: its new content.
    """
    if not (folder / DIGESTS).exists():
        return
    checksums = _read_digests(folder / DIGESTS)
    checksums[name] = hashlib.sha256(content).hexdigest()
    _write(folder, checksums)


def warn_if_edited(file: Path) -> None:
    """Warns if a file that its user may edit is not the one that was written."""
    listed = file.parent / DIGESTS
    if not listed.is_file() or not file.is_file():
        return
    expected = _read_digests(listed).get(file.name)
    if expected is not None and digest_of(file) != expected:
        why = f"its checksum is not the one in {DIGESTS}"
        warnings.warn(
            f"{file}: has been edited since it was written: {why}", DigestWarning, stacklevel=1
        )


def _read_digests(file: Path) -> dict[str, str]:
    """The checksum of each file, by name."""
    found: dict[str, str] = {}
    lines = read_text(file).split("\n")
    if lines.pop() != "":
        raise UserError(f"{file}: is damaged: its last line is not whole")
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or not all(map(is_plain_name, match[2].split("/"))):
            raise UserError(f"{file}: is damaged: {line[:80]!r}; expected lines `SHA256  FILE`")
        found[match[2]] = match[1]
    return found


def _is_unchanged(file: Path, expected: str) -> bool:
    if not file.is_file():
        return False
    try:
        return digest_of(file) == expected
    except OSError as cause:
        raise UserError(f"{file}: cannot be read: {cause.strerror}") from cause


def digest_of(file: Path) -> str:
    """SHA-256 of a file in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
