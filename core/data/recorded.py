"""The data of a run that was started before, and the comparison of a corpus with it.

Two things identify a run's data: the names and bytes of its documents, and the tokenizer in the run folder. The place
of the corpus, the version of the library `tokenizers` and the machine do not.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.contracts.corpus import Document
from core.contracts.errors import UserError
from core.data.documents import fingerprint
from core.data.tokenizer import VERSION, Tokenizer
from core.storage.documents import is_text

FORMAT = 1
"""Part of the fingerprint that run folders record: runs that were made with another value cannot be resumed."""

MOST_LISTED = 100_000
"""Documents up to which a run folder lists their names and hashes; a list of these takes about 5 MB."""


@dataclass(frozen=True)
class RecordedData:
    """What a run folder says of its data.

    Args:
        folder: the run folder, which error messages name.
        fingerprint: the data's, from `provenance.json`.
        version: the version of `tokenizers` that the run began with; part of the fingerprint.
        tokenizer: the tokenizer that the run's tokens are made with; None where its file is missing.
        documents: the hash of each document by its name; None where the folder has no list.
        is_from_file: whether the tokenizer came from a file, so that it is part of the fingerprint.
    """

    folder: Path
    fingerprint: str
    version: str
    tokenizer: Tokenizer | None = None
    documents: Mapping[str, str] | None = None
    is_from_file: bool = False

    def check_documents(self, found: str, documents: Iterable[Document]) -> None:
        """Compares a corpus with the run's.

        Args:
            found: its fingerprint under the run's version of `tokenizers`.
            documents: all documents that have text, under the names of the run's list.

        Raises:
            UserError: the corpus differs; the message names the first document that does, if the folder lists them.
        """
        if found != self.fingerprint:
            why = self._difference(documents) or _fingerprints(found, self.fingerprint)
            raise self._changed(why)

    def check_fingerprint(self, found: str) -> None:
        """Compares the fingerprint of a corpus of tokens; raises `UserError` if it differs."""
        if found != self.fingerprint:
            raise self._changed(_fingerprints(found, self.fingerprint))

    def _changed(self, why: str) -> UserError:
        return UserError(f"{self.folder}: the corpus has changed since this run began: {why}")

    def _difference(self, documents: Iterable[Document]) -> str:
        """The first document that differs, as the end of a sentence; empty where that is unknown."""
        if self.documents is None:
            return ""
        differences = {name: f"document {name!r} is missing" for name in self.documents}
        for document in documents:
            before = self.documents.get(document.name)
            which = f"document {document.name!r} ({document.source})"
            if before is None:
                differences[document.name] = f"{which} was added"
            elif before == document_hash(document):
                del differences[document.name]
            else:
                differences[document.name] = f"{which} has another text"
        return differences[min(differences)] if differences else ""


def identity(
    documents: Iterable[Document], vocab: int, version: str = VERSION, *settings: object
) -> str:
    """The fingerprint of documents and a vocabulary as a run with this version of `tokenizers` records it."""
    return fingerprint(documents, FORMAT, version, vocab, *settings)


def document_hash(document: Document) -> str:
    """The first 16 hex digits of the SHA-256 of a document's bytes: enough to see a change."""
    return hashlib.sha256(document.data).hexdigest()[:16]


class DocumentList:
    """The list of documents that a run folder keeps: a line with hash and name for each.

    There is none for more than `MOST_LISTED`, nor where a name holds a line end, or is no text: a file's name may be
    any bytes.
    """

    def __init__(self) -> None:
        self._lines: list[str] | None = []

    def add(self, document: Document) -> None:
        """Adds the next document."""
        if self._lines is None:
            return
        unwritable = "\n" in document.name or not is_text(document.name)
        if unwritable or len(self._lines) == MOST_LISTED:
            self._lines = None
        else:
            self._lines.append(f"{document_hash(document)}  {document.name}\n")

    def text(self) -> str | None:
        """The list, or None."""
        return None if self._lines is None else "".join(self._lines)


def list_documents(documents: Iterable[Document]) -> str | None:
    """The text of the `DocumentList` of some documents."""
    listed = DocumentList()
    for document in documents:
        listed.add(document)
    return listed.text()


def read_documents(text: str) -> dict[str, str]:
    """The hash of each document by its name, from what `list_documents` returned."""
    hashes = {}
    for line in text.split("\n"):
        digest, separator, name = line.partition("  ")
        if separator:
            hashes[name] = digest
    return hashes


def _fingerprints(found: str, before: str) -> str:
    return f"its fingerprint is {found[:12]}, and was {before[:12]}"
