"""Token ids laid end to end, mapped from disk and not read into memory.

Each document is written as [0, its tokens ...]: the end marker stands *before* every text, so the model
always has one token to start from, and predicting the next document's marker is how it says "the end".
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.tokenizer import END


@dataclass(frozen=True)
class TokenStore:
    """One side of the split as a stream of tokens.

    Args:
        tokens: (N,) ids, uint16 where the vocabulary allows it, else uint32.
        starts: (D,) int64, rising: where each document's marker stands.
        bytes: length of the documents' text in bytes, markers not counted.
        learned: (N,) bool, which tokens are learned where they are targets; None: all.
        sources: (D,) int64, the number of each document's source; None: one source.
    """

    tokens: NDArray[np.unsignedinteger[Any]]
    starts: NDArray[np.int64]
    bytes: int
    learned: NDArray[np.bool_] | None = None
    sources: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Tokens, markers included."""
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """Documents in the stream."""
        return len(self.starts)


def pack(documents: Iterable[Sequence[int]], vocab: int) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """Encoded documents as one array of tokens, a marker before each, and the array of their starts."""
    return join((np.array([END, *ids]) for ids in documents), vocab)


def join(pieces: Iterable[NDArray[Any]], vocab: int) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """Pieces of ids as one array of tokens in the smallest format that holds the vocabulary, and their starts in it."""
    width = np.uint16 if vocab <= 1 << 16 else np.uint32
    narrow = [piece.astype(width) for piece in pieces]
    ends = np.cumsum([0, *(len(piece) for piece in narrow)], dtype=np.int64)
    return np.concatenate([np.empty(0, dtype=width), *narrow]), ends[:-1]


def open_store(
    tokens: Path, starts: Path, text_bytes: int, learned: Path | None = None, sources: Path | None = None
) -> TokenStore:
    """Map a packed stream (two `.npy` files, or four where targets have masks and sources) from disk."""
    return TokenStore(
        np.load(tokens, mmap_mode="r").view(np.ndarray),
        np.load(starts),
        text_bytes,
        None if learned is None else np.load(learned, mmap_mode="r").view(np.ndarray),
        None if sources is None else np.load(sources),
    )
