"""What is held out for validation: documents by their names, a fraction of the text, or a corpus of its own.

By default every twentieth document (the 11th, the 31st, ...) is held out, in order of parts and names. The split
depends on these alone, so adding a rank, changing the seed or taking another vocabulary never moves a document from one
side to the other.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from core.contracts.corpus import Corpus, Document
from core.data.documents import HELD_OUT, PERIOD, Documents, read_all


@dataclass(frozen=True)
class HeldOut:
    """How the validation text is chosen; by default by names.

    Args:
        fraction: the part of the documents, or of every document's text where there are too few; None: by names.
        corpus: the corpus that is validated on; nothing is held out of the other one then.
    """

    fraction: float | None = None
    corpus: Corpus | None = None

    @property
    def by_names(self) -> bool:
        """Whether every twentieth document is held out."""
        return self.fraction is None and self.corpus is None

    def settings(self) -> list[object]:
        """What is hashed beside the documents; nothing for a split by names, as runs have recorded it."""
        return [] if self.fraction is None else ["validation_fraction", self.fraction]


class DocumentsOf:
    """Some documents of a corpus, which can be iterated any number of times.

    Args:
        select: yields them.
        count: how many there are.
        size: the bytes of their text together.
    """

    def __init__(self, select: Callable[[], Iterator[Document]], count: int, size: int) -> None:
        self.size = size
        self._select = select
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Document]:
        return self._select()


@dataclass(frozen=True)
class CorpusSplit:
    """The documents of a corpus in order, split into training and validation.

    Args:
        documents: every document that has text, sorted by part and name.
        train: the documents that the model and the tokenizer learn from.
        validation: the documents that are held out.
        is_held: which documents are held out as a whole; nothing where the end of each is.
        first: the number of training documents of part 0.
    """

    documents: Documents
    train: DocumentsOf
    validation: DocumentsOf
    is_held: NDArray[np.bool_]
    first: int

    @property
    def shift_at(self) -> float | None:
        """The fraction of a run's steps that read part 0; None: there is one part."""
        return self.documents.corpus.shift_at()

    @property
    def dropped(self) -> int:
        """How many empty documents were left out."""
        return self.documents.dropped


def read_split(corpus: Corpus, held_out: HeldOut | None = None) -> CorpusSplit:
    """Reads, checks and splits every document of a corpus."""
    return split_of(read_all(corpus), held_out or HeldOut())


def split_of(documents: Documents, held_out: HeldOut) -> CorpusSplit:
    """Splits documents; a validation corpus takes none of them."""
    count = len(documents)
    is_held = np.zeros(count, bool)
    if held_out.by_names:
        is_held[HELD_OUT::PERIOD] = True
    elif held_out.fraction is not None:
        taken = int(held_out.fraction * count + 1e-9)
        if not taken:
            return _cut_each(documents, held_out.fraction)
        is_held = _smallest(documents, taken)

    def side(chosen: NDArray[np.bool_]) -> DocumentsOf:
        size = int(documents.lengths[chosen].sum())
        return DocumentsOf(lambda: _where(documents, chosen), int(chosen.sum()), size)

    first = int((~is_held)[: documents.first].sum())
    return CorpusSplit(documents, side(~is_held), side(is_held), is_held, first)


def _where(documents: Iterable[Document], chosen: NDArray[np.bool_]) -> Iterator[Document]:
    for document, is_chosen in zip(documents, chosen, strict=True):
        if is_chosen:
            yield document


def _smallest(documents: Iterable[Document], count: int) -> NDArray[np.bool_]:
    """Marks the documents whose names have the smallest hashes, so that few move when others are added."""
    hashes = []
    for document in documents:
        name = document.name.encode("utf-8", "surrogateescape")
        hashes.append(int.from_bytes(hashlib.sha256(name).digest()[:8], "big"))
    order = np.argsort(np.array(hashes, np.uint64), kind="stable")
    chosen = np.zeros(len(hashes), bool)
    chosen[order[:count]] = True
    return chosen


def _cut_each(documents: Documents, fraction: float) -> CorpusSplit:
    """Holds out the end of every document."""

    def part(side: int) -> Iterator[Document]:
        for document in documents:
            data = cut_text(document, fraction)[side]
            if data:
                yield replace(document, data=data)

    counts = [0, 0]
    sizes = [0, 0]
    first = 0
    for document in documents:
        texts = cut_text(document, fraction)
        for side, data in enumerate(texts):
            counts[side] += bool(data)
            sizes[side] += len(data)
        first += document.part == 0 and bool(texts[0])
    return CorpusSplit(
        documents,
        train=DocumentsOf(lambda: part(0), counts[0], sizes[0]),
        validation=DocumentsOf(lambda: part(1), counts[1], sizes[1]),
        is_held=np.zeros(len(documents), bool),
        first=first,
    )


def cut_text(document: Document, fraction: float) -> tuple[bytes, bytes]:
    """Cuts a document's text in two, before its last `fraction`: after a line end, a space, or else a character.

    The cut is at the last line end, or the last space, within the two percent of the text that precede it.
    """
    data = document.data
    place = len(data) - ceil(len(data) * fraction)
    near = data[max(0, place - max(len(data) // 50, 1)) : place]
    for sign in (b"\n", b" "):
        if sign in near:
            place -= len(near) - near.rindex(sign) - 1
            return data[:place], data[place:]
    while place and (data[place] & 0xC0) == 0x80:  # within a character
        place -= 1
    return data[:place], data[place:]
