"""Says on stderr how much of a text is encoded: a bar on a terminal, and a line now and then everywhere else."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    FileSizeColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TotalFileSizeColumn,
    TransferSpeedColumn,
)

FIRST_NOTE = 5.0
"""Seconds after which a line is written first where there is no terminal; then every 10 seconds."""

WORTH_A_BAR = 8 << 20
"""Bytes of text from which a bar is shown."""


class EncodingProgress:
    """Counts the text that is encoded.

    Args:
        total: bytes of the text.
        stream: where to write; None: stderr.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._done = 0
        self._skipped = 0
        self._began = time.monotonic()
        self._next = self._began + FIRST_NOTE
        self._bar: Progress | None = None
        if self._stream.isatty() and total >= WORTH_A_BAR:
            self._bar = Progress(
                TextColumn("encoding the text"),
                BarColumn(bar_width=None),
                FileSizeColumn(),
                TextColumn("of"),
                TotalFileSizeColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "EncodingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def skip(self, size: int) -> None:
        """Counts bytes that an earlier start has encoded."""
        self._skipped += size
        self.add(size)

    def add(self, size: int) -> None:
        """Counts bytes, or about as many characters, that are encoded."""
        self._done += size
        if self._bar:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 2 * FIRST_NOTE
        rate = max(self._done - self._skipped, 1) / (now - self._began)
        left = max(self._total - self._done, 0) / rate
        print(
            f"encoding the text: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB  "
            f"{rate / 1e6:.1f} MB/s  {left:,.0f} s left",
            file=self._stream,
        )
