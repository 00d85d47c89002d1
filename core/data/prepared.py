"""The result of preparing a corpus."""

from dataclasses import dataclass

from core.data.store import TokenStore
from core.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceNames:
    """The parts of a mixture, by the numbers that the token stores have as sources.

    Args:
        names: the name of each part.
        weights: the share of each in the training sequences, together 1.
        validation_bytes: bytes of each part's validation text.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    validation_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """The tokenizer and the token streams of a run's text.

    Args:
        tokenizer: trained on the training documents alone; None where only token ids are known.
        train: the training stream.
        validation: the validation stream; empty where nothing is held out.
        fingerprint: SHA-256 of documents, vocabulary size and formats; equal if and only if the data are equal.
        dropped: empty documents that were left out.
        documents: the list that a run folder keeps, a line with hash and name for each document; None: none.
        sources: the parts of a mixture; None: one corpus.
        shift_at: the fraction of a run's steps that read the training stream before its `shift`; None: there is none.
    """

    tokenizer: Tokenizer | None
    train: TokenStore
    validation: TokenStore
    fingerprint: str
    dropped: int
    documents: str | None = None
    sources: SourceNames | None = None
    shift_at: float | None = None
