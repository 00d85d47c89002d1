"""The corpus slot: where text, or tokens, come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from core.contracts.component import Component


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        name: unique and stable; documents are ordered by it, and the validation split is taken from
            that order.
        data: its bytes, which must be UTF-8.
        source: the file that error messages name.
        part: 0, or 1 for a document that is read after the shift of a corpus that has one (`Corpus.shift_at`).
    """

    name: str
    data: bytes
    source: str
    part: int = 0


class Corpus(Component, ABC):
    """Yields documents; it knows nothing of tokens, splits or order.

    A corpus is made from its `Config` alone. It raises `UserError` if the text cannot be read or
    there is none. It must not import torch.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yields every document, in any order."""

    def shift_at(self) -> float | None:
        """Returns the fraction of a run's steps after which it reads part 1 instead of part 0; None: one part."""
        return None

    def check_source(self) -> None:
        """Raises `UserError` where it is plain, before anything is read, that there is nothing to read.

        A run calls it before torch is imported, so a wrong path is reported at once. The default checks nothing.
        """

    def as_tokens(self) -> "TokenCorpus | None":
        """Returns the corpus of tokens that is read in place of this one; None, the default, if it holds text."""
        return None

    needs_tokenizer: ClassVar[bool] = False
    """Whether the corpus is read with a tokenizer from a file (`data.tokenizer.file`), such as conversations."""

    def with_tokenizer(self, tokenizer: "CorpusTokenizer") -> "Corpus":
        """Returns the corpus as it is read with the run's tokenizer; the default: itself.

        Called only where `needs_tokenizer` is set. Raises `UserError` where the tokenizer cannot read it.
        """
        return self

    def notes(self) -> list[str]:
        """Returns what readers of a run's results must know about the last reading, a sentence each.

        A run asks after it has read the corpus; for example, how many records could not be read. The default: none.
        """
        return []


@dataclass(frozen=True)
class TokenBlock:
    """Tokens that belong together: a document, or a conversation.

    Args:
        tokens: ids, at least one; they are written into the stream as they are.
        learned: whether each token is learned where it is a target; None: all are.
        source: number of the source that the block comes from, from 0.
        text_bytes: bytes of the text that the tokens stand for, for bits per byte; 0 if it is not known.
    """

    tokens: Sequence[int]
    learned: Sequence[bool] | None = None
    source: int = 0
    text_bytes: int = 0


Split = Literal["train", "validation"]


class CorpusTokenizer(Protocol):
    """A tokenizer from a file as a corpus sees it."""

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> TokenBlock:
        """Returns a conversation in the words of the tokenizer's chat template; only the assistant's turns are learned.

        Args:
            messages: its turns, each with the keys `role` and `content`.

        Raises:
            UserError: the template does not take them, or nothing of them is learned; the message is the end of a
                sentence about the conversation.
        """


class TokenCorpus(Corpus):
    """A corpus that brings tokens, their tokenizer and its own validation split instead of documents of text.

    Blocks of a split are read more than once and must come in the same order each time.
    """

    @property
    @abstractmethod
    def vocabulary(self) -> int | None:
        """The number of entries of the vocabulary; a recipe's `data.tokenizer.vocab` must be the same number.

        None: it is not known, and the recipe's number counts.
        """

    @abstractmethod
    def tokenizer_json(self) -> str | None:
        """Returns the tokenizer of these tokens as the contents of a `tokenizer.json`; entry 0 ends a text.

        None: it is not known. The run folder then has no tokenizer, and the model reads and writes ids only.
        """

    def as_tokens(self) -> "TokenCorpus | None":
        """Returns the corpus itself."""
        return self

    @abstractmethod
    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        """Yields every block of one side of the split, in order; none for `validation` if nothing is held out."""

    def documents(self) -> Iterator[Document]:
        """Yields nothing, because there is no text."""
        return iter(())


@dataclass(frozen=True)
class MixturePart:
    """One corpus of a mixture.

    Args:
        name: its name, which logs use.
        corpus: the corpus.
        weight: its share of the sequences that are trained on, relative to the weights of the others.
    """

    name: str
    corpus: Corpus
    weight: float


class MixtureCorpus(Corpus):
    """Several corpora that are trained on together, each with a share of the sequences.

    Every sequence of a batch comes from one of them, and losses are reported by part too.
    """

    @abstractmethod
    def parts(self) -> list[MixturePart]:
        """Returns the parts, at least one, with different names; in the same order each time."""

    def documents(self) -> Iterator[Document]:
        """Yields nothing, because the parts are read one by one."""
        return iter(())
