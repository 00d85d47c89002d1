"""The sequences of a training stream: which tokens each reads, by a stretch of the stream and a number in it."""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from core.data.batch import Batch
from core.data.best_fit import BestFitSequences
from core.data.store import TokenStore
from core.data.tokenizer import END
from core.data.windows import count_sequences, cut, source_ranges

Packing = Literal["stream", "best_fit"]
"""How documents become sequences: cut out of one stream, or whole by best fit."""


class Sequences(Protocol):
    """Numbered sequences of stretches of a stream.

    Args:
        counts: how many each stretch has.
    """

    counts: NDArray[np.int64]

    def cut(self, range_B: NDArray[np.int64], sequence_B: NDArray[np.int64]) -> Batch:
        """Reads the sequences of some numbers, each of a stretch."""

    def note(self) -> str | None:
        """A line about them that a run prints before it starts; None: nothing is to be said."""


class StreamSequences:
    """Sequences that are cut out of the stream one after the other, whatever documents they begin or end in.

    Args:
        store: the training stream.
        ranges: stretches of the stream, of which an incomplete sequence at the end is left out.
        length: L, tokens in a sequence.
    """

    def __init__(self, store: TokenStore, ranges: list[tuple[int, int]], length: int) -> None:
        self._store = store
        self._length = length
        self._begins = np.array([begin for begin, _ in ranges], np.int64)
        self.counts = np.array([(end - begin - 1) // length for begin, end in ranges], np.int64)

    def cut(self, range_B: NDArray[np.int64], sequence_B: NDArray[np.int64]) -> Batch:
        """Reads the sequences of some numbers, each of a stretch."""
        begins_B = self._begins[range_B] + sequence_B * self._length
        return cut(self._store, begins_B, self._length)

    def note(self) -> str | None:
        """Nothing: no place is padding."""
        return None


def sequences_of(
    store: TokenStore,
    length: int,
    packing: Packing = "stream",
    *,
    by_source: bool = False,
    shifts: bool = False,
    marker: int = END,
) -> Sequences:
    """The sequences of a training stream.

    Args:
        store: the stream.
        length: tokens in a sequence.
        packing: how they are made.
        by_source: a stretch for each source, of a mixture.
        shifts: a stretch before and one after the `shift` of the stream.
        marker: the token before every document of text.

    Raises:
        UserError: sequences are cut out of a stream, or of a side of its shift, that is shorter than one; sources are
            checked by their order.
    """
    ranges = [(0, len(store))]
    if by_source:
        ranges = source_ranges(store)
    elif shifts and store.shift is not None:
        ranges = [(0, store.shift), (store.shift, len(store))]
    if packing == "best_fit":
        return BestFitSequences(store, ranges, length, marker)
    if not by_source:
        where = [""] if len(ranges) == 1 else [" before the shift", " after the shift"]
        for (begin, end), which in zip(ranges, where, strict=True):
            count_sequences(end - begin, length, which)
    return StreamSequences(store, ranges, length)
