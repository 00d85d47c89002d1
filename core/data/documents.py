"""Reading a corpus: the order of its documents, their split, and the fingerprint of both.

A corpus yields documents in any order. Here they are sorted by name, and every twentieth one (the 11th, the
31st, ...) is held out for validation. The split depends on the names alone, so adding
a rank, changing the seed or taking another vocabulary never moves a document from one side to the other.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from core.contracts.corpus import Corpus, Document
from core.contracts.errors import UserError

PERIOD = 20
HELD_OUT = 10
"""Document i (in order of names, from 0) is held out where i % PERIOD == HELD_OUT."""


@dataclass(frozen=True)
class CorpusSplit:
    """The documents of a corpus in order, split into training and validation.

    Args:
        documents: every document that has text, sorted by part and name.
        dropped: how many empty documents were left out.
        shift_at: the fraction of a run's steps that read part 0; None: there is one part.
    """

    documents: list[Document]
    dropped: int = 0
    shift_at: float | None = None

    @property
    def train(self) -> list[Document]:
        """The documents that the model and the tokenizer learn from."""
        kept = []
        for index, document in enumerate(self.documents):
            if index % PERIOD != HELD_OUT:
                kept.append(document)
        return kept

    @property
    def validation(self) -> list[Document]:
        """The documents that are held out; none where the corpus has fewer than 11."""
        return self.documents[HELD_OUT::PERIOD]

    @property
    def first_part(self) -> int | None:
        """The number of training documents of part 0; None: there is one part."""
        if self.shift_at is None:
            return None
        return sum(document.part == 0 for document in self.train)


def read_split(corpus: Corpus) -> CorpusSplit:
    """Reads and checks every document of a corpus, sorted by part and name.

    Empty documents are dropped before anything is counted. All bytes are held in memory, so a corpus of text
    must fit into it.

    Raises:
        UserError: no document has text, a document is not UTF-8, or two documents share a name.
    """
    found = sorted(corpus.documents(), key=lambda document: (document.part, document.name))
    kept = [document for document in found if document.data]
    if not kept:
        raise UserError(f"the corpus is empty: {_plural(len(found), 'document')}, none with text")
    for before, after in pairwise(sorted(kept, key=lambda document: document.name)):
        if before.name == after.name:
            sources = f"{before.source} and {after.source}"
            raise UserError(
                f"two documents are named {after.name!r} ({sources}): names must be unique"
            )
    for document in kept:
        text_of(document)
    shift_at = corpus.shift_at()
    _check_parts(kept, shift_at)
    return CorpusSplit(kept, dropped=len(found) - len(kept), shift_at=shift_at)


def _check_parts(documents: list[Document], shift_at: float | None) -> None:
    """Raises `UserError` for a shift of the data without text on both sides of it."""
    parts = {document.part for document in documents}
    if shift_at is None:
        assert parts <= {0}, f"documents of parts {parts} in a corpus without a shift"
        return
    assert 0 < shift_at < 1, f"a shift at {shift_at} of the run"
    for part, where in ((0, "before"), (1, "after")):
        if part not in parts:
            raise UserError(f"the corpus has no text {where} the shift of its data")


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
    """SHA-256, in hex, of some settings and of the names and bytes of documents in order.

    Every part is preceded by its length, so that moving a character from a name to a text changes the hash.
    """
    digest = hashlib.sha256()
    parts = [str(setting).encode() for setting in settings]
    for document in documents:
        # a file's name may not be valid UTF-8
        parts += [document.name.encode("utf-8", "surrogateescape"), document.data]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
