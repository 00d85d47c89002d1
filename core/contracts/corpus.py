"""The corpus slot: where text comes from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.contracts.component import Component


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        name: unique and stable; documents are ordered by it, and the validation split is taken from
            that order.
        data: its bytes, which must be UTF-8.
        source: the file to name in an error sentence.
    """

    name: str
    data: bytes
    source: str


class Corpus(Component, ABC):
    """Yields documents; knows nothing of tokens, splits or order.

    A corpus is made from its `Config` alone. It raises `UserError` where the text cannot be read or
    there is none. It must not import torch.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, in any order."""
