"""A stream of token ids, mapped from disk and not read into memory.

Each document is written as [0, its tokens ...]. The end marker is put *before* every text, so the model always has
one token to start from, and it ends a document by predicting the marker of the next one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.contracts.errors import UserError
from core.storage.documents import check_regular


@dataclass(frozen=True)
class TokenStore:
    """One side of the split as a stream of tokens.

    Args:
        tokens: (N,) ids, uint16 where the vocabulary allows it, else uint32.
        starts: (D,) int64, rising: the position of each document's marker.
        bytes: length of the documents' text in bytes, markers not counted.
        learned: (N,) bool, which tokens are learned where they are targets; None: all.
        sources: (D,) int64, the number of each document's source; None: one source.
        shift: the position where the documents of part 1 begin; None: there is one part.
    """

    tokens: NDArray[np.unsignedinteger[Any]]
    starts: NDArray[np.int64]
    bytes: int
    learned: NDArray[np.bool_] | None = None
    sources: NDArray[np.int64] | None = None
    shift: int | None = None

    def __len__(self) -> int:
        """The number of tokens, markers included."""
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """The number of documents in the stream."""
        return len(self.starts)


def width_of(vocab: int) -> type[np.unsignedinteger[Any]]:
    """The smallest format that holds the ids of a vocabulary."""
    return np.uint16 if vocab <= 1 << 16 else np.uint32


def write_header(stream: IO[bytes], dtype: np.dtype[Any], length: int) -> None:
    """Writes what a `.npy` file of a one-dimensional array begins with, as `np.save` does."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (length,),
    }
    np.lib.format.write_array_header_1_0(stream, header)


def open_store(
    tokens: Path,
    starts: Path,
    text_bytes: int,
    learned: Path | None = None,
    sources: Path | None = None,
) -> TokenStore:
    """Maps a packed stream (two `.npy` files, or four where targets have masks and sources) from disk."""
    mask = None
    if learned is not None:
        mask = _mapped(learned)
    numbers = None
    if sources is not None:
        numbers = _loaded(sources)
    return TokenStore(
        _mapped(tokens),
        _loaded(starts),
        text_bytes,
        learned=mask,
        sources=numbers,
    )


def _mapped(file: Path) -> NDArray[Any]:
    """An array of a `.npy` file, mapped from disk."""
    array: NDArray[Any] = _loaded(file, "r").view(np.ndarray)
    return array


def _loaded(file: Path, mode: Literal["r"] | None = None) -> NDArray[Any]:
    """The array of a `.npy` file.

    Raises:
        UserError: it does not hold a one-dimensional array of integers or booleans. Pickled objects are not read,
            because reading them can run code.
    """
    check_regular(file)
    try:
        array: NDArray[Any] = np.load(file, mmap_mode=mode, allow_pickle=False)
        is_valid = array.ndim == 1 and array.dtype.kind in "biu"
    except (OSError, ValueError, EOFError, AttributeError):
        is_valid = False
    if not is_valid:
        how = "remove its folder, and the data are prepared again"
        raise UserError(f"{file}: is damaged: must hold a one-dimensional array of integers; {how}")
    return array
