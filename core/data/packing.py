"""Encodes documents into streams of tokens on disk; memory stays bounded, however long the text is."""

import os
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from core.contracts.corpus import Document
from core.data.documents import text_of
from core.data.store import width_of, write_header
from core.data.tokenizer import END, Tokenizer

AT_ONCE = 64
"""Documents that are encoded together at most."""

CHARACTERS_AT_ONCE = 2_000_000
"""Characters that are encoded together, so that their encodings fit in memory."""

SPOOLED = 64 << 20
"""Bytes of tokens up to which a stream is kept in memory until it is written."""

FIRST_NOTE = 5.0
"""Seconds after which it is first said how far the encoding is; then every 10 seconds."""


class PackedStream:
    """One side's documents as tokens, a marker before each; a temporary file holds them until they are written.

    Args:
        vocab: entries of the vocabulary.
        folder: the folder of the temporary file, if it can be written.
        opening: the marker before each document.
        ending: another marker after each; None: there is none.
    """

    def __init__(
        self, vocab: int, folder: Path, opening: int = END, ending: int | None = None
    ) -> None:
        self._opening = opening
        self._ending = ending
        self._is_open = False
        where = str(folder) if os.access(folder, os.W_OK) else None
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOLED, dir=where)  # noqa: SIM115
        self._dtype = np.dtype(width_of(vocab))
        self._length = 0
        self._starts = array("q")
        self._sources = array("q")

    def begin(self, source: int) -> None:
        """Begins the next document, of a source, after the end of the one before it."""
        self.finish()
        self._is_open = True
        self._starts.append(self._length)
        self._sources.append(source)
        self.add([self._opening])

    def finish(self) -> None:
        """Ends the last document; `begin` does so for the ones before it."""
        if self._is_open and self._ending is not None:
            self.add([self._ending])
        self._is_open = False

    def add(self, ids: list[int]) -> None:
        """Adds tokens to the document."""
        self._file.write(np.array(ids, self._dtype).tobytes())
        self._length += len(ids)

    def write(self, stream: IO[bytes]) -> None:
        """Writes the tokens as a `.npy` file."""
        write_header(stream, self._dtype, self._length)
        self._file.seek(0)
        shutil.copyfileobj(self._file, stream, 1 << 20)

    def starts(self) -> NDArray[np.int64]:
        """The position of each document's marker."""
        return np.array(self._starts, np.int64)

    def sources(self) -> NDArray[np.int64]:
        """The number of each document's source."""
        return np.array(self._sources, np.int64)


def pack_into(
    packed: PackedStream,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    source: int,
    progress: "EncodingProgress",
) -> None:
    """Encodes documents, a few at a time on all cores, and adds them to a stream."""
    for pieces in _batches(_pieces(tokenizer, documents)):
        encoded = tokenizer.encode_batch([text for text, _ in pieces])
        for (text, begins), ids in zip(pieces, encoded, strict=True):
            if begins:
                packed.begin(source)
            packed.add(ids)
            progress.add(len(text))
    packed.finish()


def _pieces(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[str, bool]]:
    """Yields the texts of documents, long ones in pieces, each with whether a document begins with it."""
    for document in documents:
        for index, piece in enumerate(tokenizer.cut(text_of(document), CHARACTERS_AT_ONCE)):
            yield piece, index == 0


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Yields a few pieces at a time."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        if batch and (len(batch) == AT_ONCE or size + len(piece[0]) > CHARACTERS_AT_ONCE):
            yield batch
            batch = []
            size = 0
        batch.append(piece)
        size += len(piece[0])
    if batch:
        yield batch


class EncodingProgress:
    """Says on stderr, now and then, how much of the text is encoded.

    Args:
        total: characters of the text, or about as many.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._next = self._began + FIRST_NOTE

    def add(self, size: int) -> None:
        """Counts characters that are encoded."""
        self._done += size
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 2 * FIRST_NOTE
        rate = self._done / (now - self._began)
        left = (self._total - self._done) / rate
        print(
            f"encoding the text: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB  "
            f"{rate / 1e6:.1f} MB/s  {left:,.0f} s left",
            file=sys.stderr,
        )
