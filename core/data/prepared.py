"""The result of preparing a corpus."""

from dataclasses import dataclass

from core.data.store import TokenStore
from core.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """The tokenizer and the token streams of a run's text.

    Args:
        tokenizer: trained on the training documents alone.
        train: the training stream.
        validation: the validation stream; empty where the corpus has fewer than 11 documents.
        fingerprint: SHA-256 of documents, vocabulary size and formats; equal if and only if the data are equal.
        dropped: empty documents that were left out.
        documents: the list that a run folder keeps, a line with hash and name for each document; None: none.
        shift_at: the fraction of a run's steps that read the training stream before its `shift`; None: there is none.
    """

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore
    fingerprint: str
    dropped: int
    documents: str | None = None
    shift_at: float | None = None
