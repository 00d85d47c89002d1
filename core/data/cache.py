"""A folder of files that can be believed: made once, verified on every start.

An entry is a folder named by the hash of what went into it. Each file is written under a temporary name
beside its place and then renamed; last comes the seal, a list of checksums. Whoever reads an entry checks the
files against the seal, so a killed writer, a full disk or a flipped bit leaves an entry that is built again.
Two processes that build one entry at once write equal bytes over each other: what goes in is deterministic.
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
    """Where everything that can be built again is kept."""
    if chosen := os.environ.get("MOELOOM_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moeloom"


def intact(folder: Path) -> bool:
    """Whether an entry is there, whole and unchanged."""
    try:
        sums = json.loads((folder / SEAL).read_bytes())
        return bool(sums) and all(_sum(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def write_entry(folder: Path, files: Mapping[str, Writer]) -> None:
    """Write an entry's files and seal it.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sums = {name: _replace(folder / name, write) for name, write in files.items()}
        _replace(folder / SEAL, lambda stream: stream.write(json.dumps(sums, indent=2).encode()))
    except OSError as cause:
        raise UserError(
            f"the cache {folder} cannot be written ({cause.strerror or cause}): "
            "make room, or set MOELOOM_CACHE to another folder"
        ) from cause


def array_writer(array: NDArray[Any]) -> Writer:
    """A writer of an array as a `.npy` file."""

    def write(stream: IO[bytes]) -> None:
        np.save(stream, array)

    return write


def _replace(path: Path, write: Writer) -> str:
    """Put a file in its place in one step; returns its checksum."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            write(stream)
        checksum = _sum(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return checksum


def _sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
