"""A cache of files that are made once and verified on every start.

An entry is a folder named by the hash of what went into it. Each file is written under a temporary name
in the same folder and then renamed. The seal, a list of checksums, is written last, and a reader checks the files
against it. So a killed writer, a full disk or a flipped bit leaves an entry that is built again. Two processes
that build one entry at once write equal bytes over each other, because the contents are deterministic.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from core.contracts.errors import UserError

SEAL = "seal.json"

Writer = Callable[[IO[bytes]], object]
"""Writes the contents of one file into an open stream."""


def cache_folder() -> Path:
    """The folder of everything that can be built again: `MOELOOM_CACHE`, or `moeloom` in the user's cache folder."""
    chosen = os.environ.get("MOELOOM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    user_cache = Path(base) if base else Path.home() / ".cache"
    return user_cache / "moeloom"


def intact(folder: Path) -> bool:
    """Whether an entry exists, whole and unchanged."""
    try:
        checksums = json.loads((folder / SEAL).read_bytes())
        for name, expected in checksums.items():
            if _checksum(folder / name) != expected:
                return False
        return bool(checksums)
    except (OSError, ValueError, AttributeError):
        return False


def write_entry(folder: Path, files: Mapping[str, Writer]) -> None:
    """Writes an entry's files and seals it.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checksums = {name: _replace(folder / name, write) for name, write in files.items()}
        seal = json.dumps(checksums, indent=2).encode()
        _replace(folder / SEAL, lambda stream: stream.write(seal))
    except OSError as cause:
        raise UserError(
            f"the cache {folder} cannot be written ({cause.strerror or cause}): "
            "free some space, or set MOELOOM_CACHE to another folder"
        ) from cause


def array_writer(array: NDArray[Any]) -> Writer:
    """Returns a writer of an array as a `.npy` file."""

    def write(stream: IO[bytes]) -> None:
        np.save(stream, array)

    return write


def _replace(path: Path, write: Writer) -> str:
    """Writes a file under a temporary name, renames it and returns its checksum."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            write(stream)
        checksum = _checksum(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return checksum


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
