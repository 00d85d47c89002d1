"""One corpus of text of a run: read, surveyed and split."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from core.contracts.corpus import Corpus, Document
from core.data.documents import Fingerprint, read_all, text_of
from core.data.held_out import CorpusSplit, HeldOut, split_of
from core.data.recorded import FORMAT, DocumentList, identity
from core.data.tokenizer import VERSION, has_long_piece


class Survey:
    """What one pass over documents in order finds.

    Args:
        prefix: begins the names in the list of documents.
        settings: what is hashed before the documents.
    """

    def __init__(self, prefix: str, *settings: object) -> None:
        self.fingerprint = Fingerprint(*settings)
        self.listed = DocumentList()
        self.long: list[int] = []
        """The documents that may hold a piece that training a tokenizer cuts."""
        self._prefix = prefix
        self._count = 0

    def add(self, document: Document) -> None:
        """Takes the next document."""
        self.fingerprint.add(document)
        self.listed.add(_renamed(document, self._prefix))
        if has_long_piece(text_of(document)):
            self.long.append(self._count)
        self._count += 1


@dataclass(frozen=True)
class TextSource:
    """A corpus of text after one reading.

    Args:
        name: its name among several; empty if it is the only one.
        split: its documents.
        survey: what the reading has found.
        vocab: entries of the vocabulary.
        settings: further parts of the fingerprint.
    """

    name: str
    split: CorpusSplit
    survey: Survey
    vocab: int
    settings: tuple[object, ...]

    @property
    def has_long_piece(self) -> bool:
        """Whether a training document may hold a piece that training a tokenizer cuts."""
        return any(not self.split.is_held[index] for index in self.survey.long)

    def identity(self, version: str) -> str:
        """The fingerprint of the documents as a run with this version of `tokenizers` records it."""
        if version == VERSION:
            return self.survey.fingerprint.hexdigest()
        return identity(self.split.documents, self.vocab, version, *self.settings)

    def listed(self) -> Iterator[Document]:
        """Yields the documents under the names of the run's list."""
        for document in self.split.documents:
            yield _renamed(document, prefix_of(self.name))


def prefix_of(name: str) -> str:
    """What the names of a source's documents begin with in a list of several sources' documents."""
    return f"{name}/" if name else ""


def _renamed(document: Document, prefix: str) -> Document:
    if not prefix:
        return document
    return replace(document, name=prefix + document.name)


def read_source(name: str, corpus: Corpus, vocab: int, held_out: HeldOut) -> TextSource:
    """Reads a corpus of text.

    Raises:
        UserError: it cannot be read; see `read_all`.
    """
    surveys: list[Survey] = []
    settings = tuple(held_out.settings())

    def visit_anew() -> Survey:
        surveys.append(Survey(prefix_of(name), FORMAT, VERSION, vocab, *settings))
        return surveys[-1]

    documents = read_all(corpus, lambda: visit_anew().add)
    return TextSource(name, split_of(documents, held_out), surveys[-1], vocab, settings)
