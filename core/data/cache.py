"""A cache of files that are made once and verified on every start, and that others may share.

An entry is a folder named by the hash of what went into it. Each file is written under a temporary name
in the same folder and then renamed. The seal, a list of checksums, is written last, and a reader checks the files
against it. So a killed writer, a full disk or a flipped bit leaves an entry that is built again. A process that needs
an entry which another one is building waits for it.

Whoever can write the folder can replace files and seal together. So a seal counts only if this user has recorded it, or
once the files have been made again, without writing them, and have the same checksums.
"""

import hashlib
import io
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from core.contracts.errors import UserError
from core.storage import records
from core.storage.digests import digest_of
from core.storage.documents import read_object
from core.storage.files import is_plain_name
from core.storage.lock import hold

SEAL = "seal.json"
SEALS = "data"
"""The kind of the records of seals."""

Writer = Callable[[IO[bytes]], object]
"""Writes the contents of one file into an open stream."""


def cache_folder() -> Path:
    """The folder of everything that can be built again: `MOELOOM_CACHE`, or `moeloom` in the user's cache folder."""
    chosen = os.environ.get("MOELOOM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser()
        user_cache = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as cause:
        raise UserError(f"MOELOOM_CACHE must name a folder for prepared data: {cause}") from cause
    return user_cache / "moeloom"


def intact(folder: Path) -> bool:
    """Whether an entry exists, whole and unchanged."""
    try:
        checksums = read_object(folder / SEAL)
        for name, expected in checksums.items():
            is_ours = is_plain_name(name) and (folder / name).is_file()
            if not is_ours or digest_of(folder / name) != expected:
                return False
        return bool(checksums)
    except (OSError, UserError):
        return False


def ensure(folder: Path, make: Callable[[], Mapping[str, Writer]]) -> None:
    """Makes sure that an entry holds the files that this user makes, whoever has written it.

    Args:
        folder: the entry's.
        make: returns the writers of its files; it is called unless the entry is intact and its seal recorded.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    if folder.is_symlink():
        raise UserError(
            f"the cache {folder} is a symbolic link, through which nothing is written: remove it"
        )
    if _is_own(folder):
        return
    with _held(folder):
        if not _is_own(folder):
            _make_or_verify(folder, make)


def _is_own(folder: Path) -> bool:
    """Whether an entry is intact, and this user has recorded its seal."""
    return records.contains(SEALS, _record_of(folder)) and intact(folder)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds the lock of an entry, so that it is made once; without a cache that can be written there is none."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = folder.with_name(f".{folder.name}.lock")
            stack.enter_context(hold(lock, waiting=_note_waiting))
        yield


def _note_waiting(holder: str) -> None:
    print(f"note: waiting for {holder}, which prepares the same data", file=sys.stderr)


def _make_or_verify(folder: Path, make: Callable[[], Mapping[str, Writer]]) -> None:
    """Makes the files of an entry, and writes them unless the entry holds the same ones."""
    is_intact = intact(folder)
    files = make()
    if is_intact:
        if _seal_of({name: _checksum_of(write) for name, write in files.items()}) == _seal(folder):
            records.add(SEALS, _record_of(folder))
            return
        print(
            f"note: the cache {folder} held other data than this run's, under a seal of their own; "
            "it is written again",
            file=sys.stderr,
        )
    write_entry(folder, files)


def write_entry(folder: Path, files: Mapping[str, Writer]) -> None:
    """Writes an entry's files, seals it, and records the seal.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checksums = {name: _replace(folder / name, write) for name, write in files.items()}
        seal = _seal_of(checksums)
        _replace(folder / SEAL, lambda stream: stream.write(seal))
        records.add(SEALS, _record(folder, seal))
    except OSError as cause:
        raise UserError(
            f"the cache {folder} cannot be written ({cause.strerror or cause}): "
            "free some space, or set MOELOOM_CACHE to another folder"
        ) from cause


def _seal_of(checksums: Mapping[str, str]) -> bytes:
    return json.dumps(checksums, indent=2).encode()


def _seal(folder: Path) -> bytes:
    """The contents of an entry's seal; empty if there is no such file."""
    try:
        return (folder / SEAL).read_bytes() if (folder / SEAL).is_file() else b""
    except OSError:
        return b""


def _record_of(folder: Path) -> str:
    return _record(folder, _seal(folder))


def _record(folder: Path, seal: bytes) -> str:
    """The record of a seal; it names the entry, so that another entry's files cannot stand in for it."""
    return f"{folder.name} {hashlib.sha256(seal).hexdigest()}"


class _HashStream(io.RawIOBase):
    """A stream that keeps the checksum of what is written to it, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return memoryview(data).nbytes


def _checksum_of(write: Writer) -> str:
    """The checksum of a file that is not written."""
    stream = _HashStream()
    write(cast("IO[bytes]", stream))
    return stream.digest.hexdigest()


def array_writer(array: NDArray[Any]) -> Writer:
    """Returns a writer of an array as a `.npy` file."""

    def write(stream: IO[bytes]) -> None:
        np.save(stream, array, allow_pickle=False)

    return write


def _replace(path: Path, write: Writer) -> str:
    """Writes a file under a temporary name, renames it and returns its checksum."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            write(stream)
        checksum = digest_of(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return checksum
