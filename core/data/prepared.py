"""What preparing a corpus gives."""

from dataclasses import dataclass

from core.data.store import TokenStore
from core.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """All that a run needs to know of its text.

    Args:
        tokenizer: trained on the training documents alone.
        train: the training stream.
        validation: the validation stream; empty where the corpus has fewer than 11 documents.
        fingerprint: SHA-256 of documents, vocabulary size and formats: equal where and only where the data are.
        dropped: empty documents that were left out.
    """

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore
    fingerprint: str
    dropped: int
