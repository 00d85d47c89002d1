"""The entries of the cache: what they hold, and their removal."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.contracts.errors import UserError
from core.storage.lock import hold

NAME = re.compile(r"[0-9a-f]{64}")
"""Names of entries; nothing else in the folder is looked at."""

SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class CacheEntry:
    """One entry of the cache.

    Args:
        name: the hash that names it.
        path: its folder.
        bytes: the size of its files.
        days: days since a file of it was last opened, or written where the system does not record that.
        train_tokens: tokens of the training stream; None if the entry is not complete.
    """

    name: str
    path: Path
    bytes: int
    days: float
    train_tokens: int | None

    def to_dict(self) -> dict[str, Any]:
        """The entry in plain containers."""
        return asdict(self) | {"path": str(self.path)}


def entries_in(folder: Path) -> list[CacheEntry]:
    """The entries of a cache, the last opened first."""
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                found.append(_entry(path))
    return sorted(found, key=lambda entry: (entry.days, entry.name))


def _entry(path: Path) -> CacheEntry:
    stats = [file.lstat() for file in path.iterdir()]
    last = max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=path.lstat().st_mtime)
    return CacheEntry(
        name=path.name,
        path=path,
        bytes=sum(stat.st_size for stat in stats),
        days=max(0.0, time.time() - last) / SECONDS_A_DAY,
        train_tokens=_tokens(path / "train.tokens.npy"),
    )


def _tokens(file: Path) -> int | None:
    """The length of an array, from the beginning of its file."""
    try:
        with file.open("rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, _ = np.lib.format.read_array_header_1_0(stream)
    except (OSError, ValueError):
        return None
    return int(shape[0]) if shape else None


def choose(
    entries: Sequence[CacheEntry], names: Sequence[str], older_than: float | None
) -> list[CacheEntry]:
    """The entries to remove: those that names begin, those that were not opened for some days, or all.

    Raises:
        UserError: a name begins no entry, or several; or the days are no number of days.
    """
    if older_than is not None:
        if not older_than >= 0:
            raise UserError(f"--older-than = {older_than}: must be a number of days, at least 0")
        return [entry for entry in entries if entry.days >= older_than]
    if not names:
        return list(entries)
    chosen = []
    for name in names:
        found = [entry for entry in entries if name and entry.name.startswith(name)]
        if len(found) != 1:
            why = "no entry begins with it" if not found else f"{len(found)} entries begin with it"
            raise UserError(f"{name!r}: {why}; `python -m core.cache` lists the entries")
        chosen += [entry for entry in found if entry not in chosen]
    return chosen


def remove(entry: CacheEntry) -> None:
    """Removes an entry; a run that has opened its files keeps them until it ends.

    Raises:
        UserError: it cannot be removed.
    """
    try:
        lock = entry.path.with_name(f".{entry.name}.lock")
        with hold(lock):
            shutil.rmtree(entry.path)
    except OSError as cause:
        raise UserError(f"{entry.path} cannot be removed: {cause.strerror or cause}") from cause
