"""Reading a corpus: the order of its documents, what one pass over them finds, and the hash of both.

A corpus yields documents in any order, and they are read sorted by part and name. A small corpus is kept in memory. A
large one is read again whenever its documents are needed, if it yields them in that order by itself; so its size is
bounded by the disk.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from core.contracts.corpus import Corpus, Document
from core.contracts.errors import UserError

PERIOD = 20
HELD_OUT = 10
"""Document i (in order of names, from 0) is held out where i % PERIOD == HELD_OUT."""

IN_MEMORY = 64 << 20
"""Bytes of text up to which the documents of a corpus are kept in memory."""


class Fingerprint:
    """The SHA-256 of some settings and of the names and bytes of documents in order.

    Every part is preceded by its length, so that moving a character from a name to a text changes the hash.

    Args:
        settings: what is hashed before the documents.
    """

    def __init__(self, *settings: object) -> None:
        self._digest = hashlib.sha256()
        for setting in settings:
            self._add(str(setting).encode())

    def add(self, document: Document) -> None:
        """Adds the next document."""
        # a file's name may not be valid UTF-8
        self._add(document.name.encode("utf-8", "surrogateescape"))
        self._add(document.data)

    def _add(self, part: bytes) -> None:
        self._digest.update(len(part).to_bytes(8, "little"))
        self._digest.update(part)

    def hexdigest(self) -> str:
        """The hash so far, in hex."""
        return self._digest.hexdigest()


Visit = Callable[[Document], None]
"""Is called with each document in order."""


class Documents:
    """The documents of a corpus that have text, sorted by part and name; they can be iterated any number of times.

    Args:
        corpus: where they come from.
        kept: the documents, if they are in memory; None: they are read again each time.
        lengths: the bytes of each.
        dropped: how many empty ones were left out.
        first: how many belong to part 0; all of them unless the corpus shifts.
    """

    def __init__(
        self,
        corpus: Corpus,
        kept: list[Document] | None,
        lengths: NDArray[np.int64],
        dropped: int,
        first: int,
    ) -> None:
        self.corpus = corpus
        self.first = first
        self.lengths = lengths
        self.dropped = dropped
        self._kept = kept

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Document]:
        if self._kept is not None:
            yield from self._kept
            return
        count = 0
        for document in self.corpus.documents():
            if document.data:
                count += 1
                yield document
        if count != len(self):
            raise UserError(
                f"the corpus has changed while it was read: it had {len(self)} documents, "
                f"and now {count}"
            )


def read_all(
    corpus: Corpus, new_visit: Callable[[], Visit] | None = None, in_memory: int = IN_MEMORY
) -> Documents:
    """Reads and checks every document of a corpus, in order of parts and names.

    Empty documents are dropped before anything is counted.

    Args:
        corpus: the corpus.
        new_visit: makes what is called with every document in order. It is made again where the order of the corpus
            turns out to be another one.
        in_memory: bytes of text above which the documents are not kept, unless they must be sorted.

    Raises:
        UserError: no document has text, a document is not UTF-8, two documents share a name, or the corpus shifts and
            has no text on one side of the shift.
    """
    reading = _Reading(new_visit, in_memory)
    for document in corpus.documents():
        reading.add(document)
    if reading.needs_memory:
        reading = _Reading(new_visit, None)
        for document in corpus.documents():
            reading.add(document)
    return reading.finish(corpus)


@dataclass
class _Reading:
    """One reading of a corpus.

    Args:
        new_visit: see `read_all`.
        in_memory: bytes of text above which documents are not kept; None: all are.
    """

    new_visit: Callable[[], Visit] | None
    in_memory: int | None
    kept: list[Document] | None = field(default_factory=list)
    last: Document | None = None
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    found: int = 0
    first: int = 0
    size: int = 0
    is_sorted: bool = True

    def __post_init__(self) -> None:
        self.visit = self.new_visit() if self.new_visit else None

    def add(self, document: Document) -> None:
        """Takes the next document of the corpus."""
        self.found += 1
        if not document.data:
            return
        self.lengths.append(len(document.data))
        self.size += len(document.data)
        self.first += document.part == 0
        if self.last is not None and not _follows(document, self.last):
            _check_names(self.last, document)
            self.is_sorted = False
        self.last = document
        if self.kept is not None:
            self.kept.append(document)
            if self.in_memory is not None and self.size > self.in_memory and self.is_sorted:
                self.kept = None
        if self.is_sorted:
            text_of(document)
            if self.visit:
                self.visit(document)

    @property
    def needs_memory(self) -> bool:
        """Whether the documents must be sorted, and are not in memory."""
        return not self.is_sorted and self.kept is None

    def finish(self, corpus: Corpus) -> Documents:
        """Checks and sorts the documents."""
        if not self.lengths:
            raise UserError(
                f"the corpus is empty: {_plural(self.found, 'document')}, none with text"
            )
        if not self.is_sorted and self.kept is not None:
            for before, after in pairwise(sorted(self.kept, key=lambda document: document.name)):
                _check_names(before, after)
            self.kept.sort(key=lambda document: (document.part, document.name))
            visit = self.new_visit() if self.new_visit else None
            for document in self.kept:
                text_of(document)
                if visit:
                    visit(document)
            self.lengths = array("q", [len(document.data) for document in self.kept])
        lengths = np.array(self.lengths, np.int64)
        _check_parts(self.first, len(lengths), corpus.shift_at())
        return Documents(corpus, self.kept, lengths, self.found - len(lengths), self.first)


def _follows(document: Document, last: Document) -> bool:
    """Whether documents come in order; where names also rise from part to part, no two can be equal."""
    return document.name > last.name and document.part >= last.part


def _check_parts(first: int, count: int, shift_at: float | None) -> None:
    """Raises `UserError` for a shift of the data without text on both sides of it.

    Args:
        first: the number of documents of part 0.
        count: the number of all documents.
        shift_at: the fraction of the run's steps that read part 0; None: there is one part.
    """
    if shift_at is None:
        assert first == count, f"{count - first} documents of part 1 in a corpus without a shift"
        return
    assert 0 < shift_at < 1, f"a shift at {shift_at} of the run"
    for size, where in ((first, "before"), (count - first, "after")):
        if not size:
            raise UserError(f"the corpus has no text {where} the shift of its data")


def _check_names(before: Document, after: Document) -> None:
    if before.name == after.name:
        sources = f"{before.source} and {after.source}"
        raise UserError(f"two documents are named {after.name!r} ({sources}): names must be unique")


def text_of(document: Document) -> str:
    """A document's text.

    Raises:
        UserError: it is not UTF-8. No byte is replaced, or bits per byte would count text that is not in the file.
    """
    try:
        return document.data.decode("utf-8")
    except UnicodeDecodeError as cause:
        byte = document.data[cause.start]
        found = f"byte 0x{byte:02x} at offset {cause.start} ({cause.reason})"
        raise UserError(f"{document.source} is not UTF-8: {found}") from None


def bytes_in(documents: Iterable[Document]) -> int:
    """The length of some documents' text in bytes, the denominator of bits per byte."""
    return sum(len(document.data) for document in documents)


def fingerprint(documents: Iterable[Document], *settings: object) -> str:
    """The `Fingerprint` of some settings and documents, in hex."""
    digest = Fingerprint(*settings)
    for document in documents:
        digest.add(document)
    return digest.hexdigest()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
