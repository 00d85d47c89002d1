"""All moves of a conversion, into a folder that appears whole or not at all.

Everything is written into a hidden folder beside the target and renamed at the end. A journal there says which moves
are done and on the disk, so a conversion that was stopped goes on where it was when the same command is given again.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from core.contracts.errors import UserError
from core.interop.blocks import WriteBlocks
from core.interop.moves import Move
from core.interop.tensors import Tensors
from core.interop.writing import Plan, Writer

JOURNAL = "journal"
EVERY = 512 * 2**20
"""Bytes between two entries of the journal: what a kill may cost."""


def check_target(target: Path, how: str) -> None:
    """Raises `UserError` where a conversion would overwrite something."""
    if target.is_dir() and not target.is_symlink():
        if (target / "recipe.yaml").exists():
            raise UserError(f"{target}: holds a run already, and nothing is overwritten; {how}")
        if any(target.iterdir()):
            raise UserError(f"{target}: is not empty, and nothing is overwritten; {how}")
    elif target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already, and nothing is overwritten; {how}")


class Conversion:
    """A folder in the making.

    Args:
        target: where it will be.
        identity: what decides its bytes; a folder that was begun with another one is begun anew.
        say: told what a person at the terminal wants to know.
    """

    def __init__(self, target: Path, identity: Any, say: Callable[[str], None]) -> None:
        self._say = say
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.resumed = self._moving = False
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    @contextmanager
    def folder_in_the_making(self, needed: int) -> Iterator[Path]:
        """The hidden folder; renamed to the target at the end.

        Args:
            needed: bytes that will be written.

        Raises:
            UserError: no space is left, or another process makes the same folder.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                try:
                    yield self.folder
                except UserError:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    raise
                except (KeyboardInterrupt, SystemExit):
                    self._say(f"what is done is kept in {self.folder}; the same command goes on from there")
                    raise
                _flush_tree(self.folder)
                os.replace(self.folder, self.target)
                (self.target / JOURNAL).unlink()
                _flush_folder(self.target)
                _flush_folder(self.target.parent)
        except OSError as cause:
            if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"{self.target}: cannot be written: {cause.strerror}") from cause
            if self._moving:
                how = "what is done is kept: make room and give the same command again"
            else:
                how = f"{needed / 1e9:.3g} GB are needed, and nothing was kept"
                shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(f"{self.target}: no space is left on the disk; {how}") from cause

    @contextmanager
    def _locked(self) -> Iterator[None]:
        journal = self.folder / JOURNAL
        if self.folder.exists() and not journal.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder}: is in the way; remove it")
        self.folder.mkdir(exist_ok=True)
        with journal.open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.target}: another process is converting to it") from None
            self._stream = stream
            self._begin_or_go_on()
            if self.resumed:
                self._say(f"going on with {self.folder}, which an earlier conversion left")
            yield

    def _begin_or_go_on(self) -> None:
        self._stream.seek(0)
        lines = self._stream.read().splitlines()
        self._done = {int(line) for line in lines[1:] if line.isdigit()}
        self.resumed = bool(lines) and lines[0] == self._identity
        if not self.resumed:
            self._done = set()
            for file in self.folder.iterdir():
                if file.name != JOURNAL:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            self._stream.truncate(0)

    def move(self, moves: Sequence[Move], source: Tensors, plan: Plan, place: Path) -> None:
        """Do all moves that are not done yet.

        Args:
            moves: in order.
            source: where they read.
            plan: the files that are written.
            place: the folder for the weights, inside the hidden folder or the hidden folder itself.
        """
        place.mkdir(exist_ok=True)
        writer = Writer(place, plan)
        if not self.resumed:
            writer.create()
            self._note([self._identity])
        self._moving = True
        target = WriteBlocks(writer)
        fresh: list[str] = []
        held = 0
        with _bar(sum(move.bytes for move in moves)) as advance:
            for number, move in enumerate(moves):
                if number not in self._done:
                    move.run(source, target)
                    fresh.append(str(number))
                    held += move.bytes
                if held >= EVERY:
                    target.sync()
                    self._note(fresh)
                    fresh, held = [], 0
                advance(move.bytes)
        target.sync()
        self._note(fresh)

    def _note(self, lines: Sequence[str]) -> None:
        self._stream.write("".join(f"{line}\n" for line in lines))
        _flushed(self._stream)


def _flushed(stream: IO[str]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _flush_tree(top: Path) -> None:
    """Everything in a folder on the disk: after a power cut, a folder that was renamed must not name empty files."""
    for folder, _, files in os.walk(top):
        for name in files:
            with open(os.path.join(folder, name), "rb") as stream:
                os.fsync(stream.fileno())
        _flush_folder(folder)


def _flush_folder(folder: str | Path) -> None:
    """A folder's names on the disk; a file system that syncs no folders keeps its own order."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where somebody looks at it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("converting", total=total)
        yield lambda done: progress.advance(task, done)
