"""What is kept of a cache entry that is being made, so that a program that was killed does not begin anew.

Whoever can write the cache can put files there. So a file counts only if this user has recorded its checksum.
"""

import hashlib
import secrets
from contextlib import suppress
from pathlib import Path

from core.storage import records

SUFFIX = ".unfinished"
"""Ending of such a file's name."""

RECORDS = "unfinished"
"""The kind of their records."""


def kept_bytes(file: Path) -> bytes | None:
    """The content of a file that `keep_bytes` wrote; None where there is none, or it was changed since."""
    try:
        if file.is_symlink() or not file.is_file():
            return None
        content = file.read_bytes()
    except OSError:
        return None
    return content if records.contains(RECORDS, _record(file, content)) else None


def keep_bytes(file: Path, content: bytes) -> None:
    """Writes a file in an entry's folder and records it; a reader never finds half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{secrets.token_hex(8)}{SUFFIX}")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    records.add(RECORDS, _record(file, content))


def remove_unfinished(folder: Path) -> None:
    """Removes such files of an entry, which is whole without them."""
    for pattern in (f"*{SUFFIX}", f".*{SUFFIX}"):
        for file in folder.glob(pattern):
            with suppress(OSError):
                file.unlink()


def _record(file: Path, content: bytes) -> str:
    """The record of a file, which names the entry that it belongs to."""
    return f"{file.parent.name} {file.name} {hashlib.sha256(content).hexdigest()}"
