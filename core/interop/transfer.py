"""Runs all operations of a conversion; the target folder appears complete or not at all.

Everything is written into a hidden folder beside the target, which is renamed at the end. A journal in it lists the
operations whose results are on the disk, so the same command continues a conversion that was stopped.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from core.contracts.errors import UserError
from core.interop.blocks import WriteBlocks
from core.interop.tensor_ops import TensorOp
from core.interop.tensors import TensorReader
from core.interop.writing import FilePlan, ShardWriter
from core.storage.lock import AlreadyLocked, hold

JOURNAL = "journal"
EVERY = 512 * 2**20
"""Bytes between two entries of the journal: at most so much work is lost when the process is killed."""


def check_target(target: Path, how: str) -> None:
    """Raises `UserError` if a conversion to `target` would overwrite something; `how` says what to do instead."""
    if target.is_dir() and not target.is_symlink():
        if (target / "recipe.yaml").exists():
            raise UserError(f"{target}: holds a run already, and nothing is overwritten; {how}")
        if any(target.iterdir()):
            raise UserError(f"{target}: is not empty, and nothing is overwritten; {how}")
    elif target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already, and nothing is overwritten; {how}")


class Conversion:
    """A target folder that is being written.

    Args:
        target: the folder.
        identity: everything that determines its content; a conversion that was begun with another one starts again.
        say: called with each message for the user.
    """

    def __init__(self, target: Path, identity: Any, say: Callable[[str], None]) -> None:
        self._say = say
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.resumed = False
        self._created = False
        described = json.dumps(identity, sort_keys=True, default=str)
        self._identity = hashlib.sha256(described.encode()).hexdigest()

    @contextmanager
    def partial_folder(self, needed: int) -> Iterator[Path]:
        """Yields the hidden folder; it is renamed to the target at the end.

        Args:
            needed: bytes that will be written.

        Raises:
            UserError: no space is left, or another process converts to the same folder.
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
                    self._say(
                        f"what is done is kept in {self.folder}; the same command continues from there"
                    )
                    raise
                _flush_tree(self.folder)
                os.replace(self.folder, self.target)
                (self.target / JOURNAL).unlink()
                _flush_folder(self.target)
                _flush_folder(self.target.parent)
        except OSError as cause:
            if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"{self.target}: cannot be written: {cause.strerror}") from cause
            if self._created:
                how = "what is done is kept: free some space and give the same command again"
            else:
                how = f"{needed / 1e9:.3g} GB are needed, and nothing was kept"
                shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(f"{self.target}: no space is left on the disk; {how}") from cause

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of the target, and opens the journal."""
        lock = self.target.with_name(f".{self.target.name}.lock")
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(lock))
            except AlreadyLocked as cause:
                who = cause.holder
                raise UserError(f"{self.target}: {who} is converting to it") from None
            check_target(self.target, "name another folder")
            self._stream = stack.enter_context(self._open_journal())
            self._read_journal()
            if self.resumed:
                self._say(f"continuing {self.folder}, which an earlier conversion left")
            yield

    def _open_journal(self) -> IO[str]:
        """Makes the hidden folder, and opens the journal in it."""
        journal = self.folder / JOURNAL
        if self.folder.exists() and not journal.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder}: is in the way and no unfinished conversion (no {JOURNAL}); remove it"
            )
        self.folder.mkdir(exist_ok=True)
        return journal.open("a+", encoding="utf-8", errors="replace")

    def _read_journal(self) -> None:
        """Reads which operations are done; removes what a conversion with another identity left."""
        self._stream.seek(0)
        lines = self._stream.read().splitlines()
        self._done = {int(line) for line in lines[1:] if line.isdecimal()}
        self.resumed = bool(lines) and lines[0] == self._identity
        if not self.resumed:
            self._done = set()
            for file in self.folder.iterdir():
                if file.is_dir():
                    shutil.rmtree(file)
                elif file.name != JOURNAL:
                    file.unlink()
            self._stream.truncate(0)

    def run(
        self, ops: Sequence[TensorOp], source: TensorReader, plan: FilePlan, folder: Path
    ) -> None:
        """Runs all operations that are not done yet.

        Args:
            ops: the operations in order.
            source: the tensors that they read.
            plan: the files that are written.
            folder: the folder for the weights: the hidden folder, or a folder inside it.
        """
        folder.mkdir(exist_ok=True)
        writer = ShardWriter(folder, plan)
        if not self.resumed:
            writer.create()
            self._note([self._identity])
        self._created = True
        target = WriteBlocks(writer)
        fresh: list[str] = []
        held = 0
        with _bar(sum(op.bytes for op in ops)) as advance:
            for number, op in enumerate(ops):
                if number not in self._done:
                    op.run(source, target)
                    fresh.append(str(number))
                    held += op.bytes
                if held >= EVERY:
                    target.sync()
                    self._note(fresh)
                    fresh = []
                    held = 0
                advance(op.bytes)
        target.sync()
        self._note(fresh)

    def _note(self, lines: Sequence[str]) -> None:
        """Appends lines to the journal, on the disk."""
        self._stream.write("".join(f"{line}\n" for line in lines))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _flush_tree(top: Path) -> None:
    """Flushes all files of a folder to the disk, so that no renamed folder holds empty files after a power cut."""
    for folder, _, files in os.walk(top):
        for name in files:
            with open(os.path.join(folder, name), "rb") as stream:
                os.fsync(stream.fileno())
        _flush_folder(folder)


def _flush_folder(folder: str | Path) -> None:
    """Flushes the entries of a folder to the disk, where the file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on stderr if that is a terminal, and yields a function that advances it by some bytes."""
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
