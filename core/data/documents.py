"""Reading a corpus: order, split, and the name of what was read.

A corpus yields documents in any order. Here they are put in order of their names, and every twentieth
one (the 11th, the 31st, ...) is held out for validation. The split depends on the names alone, so adding
a rank, changing the seed or taking another vocabulary never moves a document from one side to the other.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from core.contracts.corpus import Corpus, Document
from core.contracts.errors import UserError

PERIOD, HELD_OUT = 20, 10
"""Document i (in order of names, from 0) is held out where i % PERIOD == HELD_OUT."""


@dataclass(frozen=True)
class Split:
    """A corpus in order, cut in two.

    Args:
        documents: every document that has text, sorted by name.
        dropped: how many empty documents were left out.
    """

    documents: list[Document]
    dropped: int = 0

    @property
    def train(self) -> list[Document]:
        """What a model (and the tokenizer) may learn from."""
        return [document for index, document in enumerate(self.documents) if index % PERIOD != HELD_OUT]

    @property
    def validation(self) -> list[Document]:
        """What is held out; nothing where there are fewer than 11 documents."""
        return self.documents[HELD_OUT::PERIOD]


def read_split(corpus: Corpus) -> Split:
    """Every document of a corpus, checked, in order of names.

    Empty documents are dropped before anything is counted. All bytes are held in memory: a corpus is as
    large as a laboratory's, not a crawl.

    Raises:
        UserError: no document has text, a document is not UTF-8, or two documents share a name.
    """
    found = sorted(corpus.documents(), key=lambda document: document.name)
    kept = [document for document in found if document.data]
    if not kept:
        raise UserError(f"the corpus is empty: {_plural(len(found), 'document')}, none with text")
    for before, after in pairwise(kept):
        if before.name == after.name:
            raise UserError(
                f"two documents are named {after.name!r} ({before.source} and {after.source}): names must be unique"
            )
    for document in kept:
        text_of(document)
    return Split(kept, dropped=len(found) - len(kept))


def text_of(document: Document) -> str:
    """A document's text.

    Raises:
        UserError: it is not UTF-8. Bytes are never replaced: bits per byte would then count text that is
            not in the file.
    """
    try:
        return document.data.decode("utf-8")
    except UnicodeDecodeError as cause:
        byte = document.data[cause.start]
        raise UserError(
            f"{document.source} is not UTF-8: byte 0x{byte:02x} at offset {cause.start} ({cause.reason})"
        ) from None


def bytes_in(documents: Iterable[Document]) -> int:
    """The real length of some documents in bytes: the denominator of bits per byte."""
    return sum(len(document.data) for document in documents)


def fingerprint(documents: Iterable[Document], *settings: object) -> str:
    """SHA-256, in hex, of some settings and of the names and bytes of documents in order.

    Every part goes in behind its own length, so that moving a character from a name to a text changes the sum.
    """
    digest = hashlib.sha256()
    parts = [str(setting).encode() for setting in settings]
    for document in documents:
        parts += [document.name.encode(), document.data]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
