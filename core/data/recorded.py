"""The data of a run that was started before, and the comparison of a corpus with it.

Two things identify a run's data: the names and bytes of its documents, and the tokenizer in the run folder. The place
of the corpus, the version of the library `tokenizers` and the machine do not.
"""

import hashlib
from collections.abc import Mapping
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
    """

    folder: Path
    fingerprint: str
    version: str
    tokenizer: Tokenizer | None = None
    documents: Mapping[str, str] | None = None

    def check_documents(
        self, documents: list[Document], vocab: int, shift_at: float | None = None
    ) -> None:
        """Compares a corpus with the run's.

        Args:
            documents: all documents that have text, in order of parts and names.
            vocab: entries of the tokenizer.
            shift_at: the fraction of the run's steps that read part 0; None: there is one part.

        Raises:
            UserError: the corpus differs; the message names the first document that does, if the folder lists them.
        """
        found = identity(documents, vocab, self.version, shift_at)
        if found != self.fingerprint:
            why = self._difference(documents) or _fingerprints(found, self.fingerprint)
            raise self._changed(why)

    def check_fingerprint(self, found: str) -> None:
        """Compares the fingerprint of a corpus of tokens; raises `UserError` if it differs."""
        if found != self.fingerprint:
            raise self._changed(_fingerprints(found, self.fingerprint))

    def _changed(self, why: str) -> UserError:
        return UserError(f"{self.folder}: the corpus has changed since this run began: {why}")

    def _difference(self, documents: list[Document]) -> str:
        """The first document that differs, as the end of a sentence; empty where that is unknown."""
        if self.documents is None:
            return ""
        now = {document.name: document for document in documents}
        for name in sorted({*self.documents, *now}):
            if name not in now:
                return f"document {name!r} is missing"
            if name not in self.documents:
                return f"document {name!r} ({now[name].source}) was added"
            if document_hash(now[name]) != self.documents[name]:
                return f"document {name!r} ({now[name].source}) has another text"
        return ""


def identity(
    documents: list[Document], vocab: int, version: str = VERSION, shift_at: float | None = None
) -> str:
    """The fingerprint of documents and a vocabulary as a run with this version of `tokenizers` records it.

    Where the data shift, it holds the place of the shift and the number of documents before it.
    """
    settings: list[object] = [FORMAT, version, vocab]
    if shift_at is not None:
        first = sum(document.part == 0 for document in documents)
        settings += ["shift", shift_at, first]
    return fingerprint(documents, *settings)


def document_hash(document: Document) -> str:
    """The first 16 hex digits of the SHA-256 of a document's bytes: enough to see a change."""
    return hashlib.sha256(document.data).hexdigest()[:16]


def list_documents(documents: list[Document]) -> str | None:
    """The text of a list of documents, a line with hash and name for each; None for more than `MOST_LISTED`.

    There is none either where a name holds a line end, or is no text: a file's name may be any bytes.
    """
    if len(documents) > MOST_LISTED:
        return None
    lines = []
    for document in documents:
        if "\n" in document.name or not is_text(document.name):
            return None
        lines.append(f"{document_hash(document)}  {document.name}\n")
    return "".join(lines)


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
