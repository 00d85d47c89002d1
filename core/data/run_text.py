"""The text of a run: one corpus or the parts of a mixture, and the validation text of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from core.contracts.corpus import Corpus, Document, MixtureCorpus, MixturePart
from core.contracts.errors import UserError
from core.data.documents import fingerprint
from core.data.held_out import DocumentsOf, HeldOut
from core.data.prepared import SourceNames
from core.data.text_source import TextSource, read_source
from core.data.tokenizer import VERSION

VALIDATION = "validation"
"""The name of a validation corpus in the list of documents."""


@dataclass(frozen=True)
class Side:
    """The documents of one side of the split.

    Args:
        documents: those of each source, with its number.
        has_sources: whether the numbers mean the parts of a mixture.
    """

    documents: list[tuple[int, DocumentsOf]]
    has_sources: bool = False

    @property
    def size(self) -> int:
        """The bytes of the text."""
        return sum(documents.size for _, documents in self.documents)

    def sizes(self, sources: int) -> tuple[int, ...]:
        """The bytes of each source's text; zeros where the numbers mean no parts."""
        found = [0] * sources
        if self.has_sources:
            for number, documents in self.documents:
                found[number] += documents.size
        return tuple(found)


@dataclass(frozen=True)
class RunText:
    """The documents of a run.

    Args:
        sources: every corpus that was read, validation corpora last.
        roles: what each is for, `train` or `validation`.
        train: the training side.
        validation: the validation side.
        part_names: the names of a mixture's parts; an empty one where there is one corpus.
        weights: the share of each part in the training sequences.
        markers: further special tokens of the tokenizer that is trained.
    """

    sources: list[TextSource]
    roles: list[str]
    train: Side
    validation: Side
    part_names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    markers: tuple[str, ...] = ()

    def tokens_identity(self, version: str = VERSION) -> str:
        """The hash of what makes the tokens, under a version of `tokenizers`."""
        key = self._text_identity(version)
        return fingerprint([], key, "markers", *self.markers) if self.markers else key

    def _text_identity(self, version: str) -> str:
        """The hash of the documents, the vocabulary and the split."""
        if len(self.sources) == 1 and not self.weights:
            return self.sources[0].identity(version)
        settings: list[str] = []
        for role, source in zip(self.roles, self.sources, strict=True):
            settings += [role, source.name, source.identity(version)]
        return fingerprint([], *settings)

    def identity(self, version: str = VERSION) -> str:
        """The fingerprint of the data as a run with this version of `tokenizers` records it."""
        key = self.tokens_identity(version)
        if self.weights:
            return fingerprint([], key, *self.weights)
        if self.shift_at is not None:
            return fingerprint(
                [], key, "shift", self.shift_at, self.sources[0].split.documents.first
            )
        return key

    @property
    def shift_at(self) -> float | None:
        """The fraction of a run's steps that read part 0; None: there is one part."""
        return self.sources[0].split.shift_at

    @property
    def first_part(self) -> int | None:
        """The number of training documents of part 0; None: there is one part."""
        return None if self.shift_at is None else self.sources[0].split.first

    @property
    def has_long_piece(self) -> bool:
        """Whether a training document may hold a piece that training a tokenizer cuts."""
        roles = zip(self.roles, self.sources, strict=True)
        return any(role == "train" and source.has_long_piece for role, source in roles)

    def listed(self) -> Iterator[Document]:
        """Yields all documents under the names of the run's list."""
        return chain.from_iterable(source.listed() for source in self.sources)

    def list_text(self) -> str | None:
        """The list of documents that a run folder keeps; None: none."""
        parts = []
        for source in self.sources:
            part = source.survey.listed.text()
            if part is None:
                return None
            parts.append(part)
        return "".join(parts)

    def names(self) -> SourceNames | None:
        """The parts of a mixture; None for one corpus."""
        if not self.weights:
            return None
        sizes = self.validation.sizes(len(self.part_names))
        return SourceNames(self.part_names, self.weights, sizes)


def read_text(corpus: Corpus, vocab: int, held_out: HeldOut) -> RunText:
    """Reads a corpus of text, or every part of a mixture, and the validation corpus if there is one.

    Raises:
        UserError: a corpus cannot be read, is one of tokens, or the validation corpus has a part that is not trained
            on.
    """
    is_mixture = isinstance(corpus, MixtureCorpus)
    parts = _parts_of(corpus)
    if is_mixture:
        for part in parts:
            _check_one_part(part.corpus, f"the part {part.name!r} of a mixture")
    if held_out.corpus is not None:
        for part in _parts_of(held_out.corpus):
            _check_one_part(part.corpus, "data.validation")
    own = [read_source(part.name, _text_only(part.corpus), vocab, held_out) for part in parts]
    numbered = list(enumerate(own))
    train = Side([(number, source.split.train) for number, source in numbered], is_mixture)
    sources = list(own)
    if held_out.corpus is None:
        held = [(number, source.split.validation) for number, source in numbered]
        validation = Side(held, is_mixture)
    else:
        validation, others = _read_validation(held_out.corpus, vocab, corpus, parts)
        sources += others
    weights: tuple[float, ...] = ()
    if is_mixture:
        weights = shares_of(parts)
    return RunText(
        sources=sources,
        roles=["train"] * len(own) + ["validation"] * (len(sources) - len(own)),
        train=train,
        validation=validation,
        part_names=tuple(part.name for part in parts),
        weights=weights,
    )


def shares_of(parts: list[MixturePart]) -> tuple[float, ...]:
    """The share of each part of a mixture in the training sequences, together 1."""
    total = sum(part.weight for part in parts)
    return tuple(part.weight / total for part in parts)


def _parts_of(corpus: Corpus) -> list[MixturePart]:
    if isinstance(corpus, MixtureCorpus):
        return corpus.parts()
    return [MixturePart("", corpus, 1.0)]


def _read_validation(
    corpus: Corpus, vocab: int, trained: Corpus, trained_parts: list[MixturePart]
) -> tuple[Side, list[TextSource]]:
    """The validation side of a corpus of its own, all of whose documents are validated on."""
    parts = _parts_of(corpus)
    known = [part.name for part in trained_parts]
    by_part = isinstance(corpus, MixtureCorpus) and isinstance(trained, MixtureCorpus)
    sides = []
    sources = []
    for part in parts:
        number = 0
        if by_part:
            if part.name not in known:
                raise UserError(
                    f"data.validation has the part {part.name!r}, and data.corpus has "
                    f"{', '.join(known)}: a part must be trained on too"
                )
            number = known.index(part.name)
        name = f"{VALIDATION}/{part.name}" if part.name else VALIDATION
        source = read_source(name, _text_only(part.corpus), vocab, HeldOut(corpus=part.corpus))
        sources.append(source)
        sides.append((number, source.split.train))
    return Side(sides, by_part), sources


def _check_one_part(corpus: Corpus, name: str) -> None:
    """Raises `UserError` for a corpus that shifts where none may."""
    if corpus.shift_at() is not None:
        raise UserError(f"{name} must not shift: only data.corpus itself can change during a run")


def _text_only(corpus: Corpus) -> Corpus:
    if corpus.as_tokens() is not None:
        raise UserError(
            "a corpus of text cannot be joined with one of token ids, whose tokenizer is another: "
            "give text for all corpora (data.corpus, data.validation)"
        )
    return corpus
