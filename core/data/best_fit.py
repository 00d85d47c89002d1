"""Best-fit packing (arXiv 2404.10830): sequences of whole documents, so that few are cut.

A document longer than a sequence is cut into pieces of a sequence's length; everything else stays whole. The
longest pieces are placed first, and each goes into the sequence with the least space that suffices, or into a new one
(best-fit decreasing). What stays free at a sequence's end is padding.
"""

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.data.batch import Batch
from core.data.store import TokenStore
from core.data.tokenizer import END


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The bin of each piece, by best-fit decreasing.

    The pieces of one length are taken in their order, and of bins with the same space the first. The spaces that some
    bin has are the bits of one number, so that the least that suffices is its lowest bit from the piece's length on.

    Args:
        lengths: (P,) of the pieces, each between 1 and `capacity`.
        capacity: how many tokens a bin holds.
    """
    bins = np.empty(len(lengths), np.int64)
    with_space: dict[int, list[int]] = {}
    spaces = 0
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = heapq.heappop(with_space[space])
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space = capacity
            chosen = count
            count += 1
        bins[piece] = chosen
        rest = space - length
        if rest:
            heapq.heappush(with_space.setdefault(rest, []), chosen)
            spaces |= 1 << rest
    return bins


def split_documents(starts: NDArray[np.int64], end: int, length: int) -> NDArray[np.int64]:
    """The pieces of documents: (P, 2), the first token of each and how many it has, in the stream's order.

    A sequence holds L inputs and the target of the last, L + 1 tokens. Neighbouring pieces of a cut document share a
    token, the last target of one and the first input of the next, so that each token but the first is predicted once.

    Args:
        starts: (D,) the first token of each document.
        end: the token past the last document's last.
        length: L, tokens in a sequence.
    """
    sizes = np.diff(np.append(starts, end))
    counts = np.maximum(1, -(-(sizes - 1) // length))
    documents = np.repeat(np.arange(len(starts)), counts)
    firsts = np.cumsum(counts) - counts
    offsets = (np.arange(len(documents)) - firsts[documents]) * length
    held = np.minimum(sizes[documents] - offsets, length + 1)
    return np.stack([starts[documents] + offsets, held], axis=1)


@dataclass(frozen=True)
class PackedRange:
    """The sequences of a stretch of a training stream, packed by best fit.

    Args:
        begins: (P,) the first token of each piece, sequence by sequence.
        lengths: (P,) how many tokens it has.
        firsts: (S + 1,) the first piece of each sequence, and at the end P.
        cut: documents that were longer than a sequence.
    """

    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]
    firsts: NDArray[np.int64]
    cut: int

    @property
    def count(self) -> int:
        """The number of sequences."""
        return len(self.firsts) - 1


def pack_range(store: TokenStore, begin: int, end: int, length: int) -> PackedRange:
    """Packs the documents between two tokens of a stream, which begin with one and end with another."""
    chosen = store.starts[(store.starts >= begin) & (store.starts < end)]
    pieces = split_documents(chosen, end, length)
    bins = best_fit(pieces[:, 1], length + 1)
    # within a sequence in the order of the stream: numbers of documents must not fall
    order = np.lexsort((pieces[:, 0], bins))
    sizes = np.bincount(bins)
    firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    cut = int((np.diff(np.append(chosen, end)) > length + 1).sum())
    return PackedRange(pieces[order, 0], pieces[order, 1], firsts, cut)


class BestFitSequences:
    """Sequences of whole documents.

    What follows a document in its sequence may be a later piece of a long one; that piece's first token is not learned.
    The end of a document is learned as in a stream: by predicting the marker of the next, and where nothing follows,
    the marker that stands in the first free place. Tokens that a corpus brings have markers of their own, or none, so
    nothing is added to them.

    Args:
        store: the training stream.
        ranges: stretches of the stream; no sequence has documents of two.
        length: L, tokens in a sequence.
        marker: the token before every document.
    """

    def __init__(
        self,
        store: TokenStore,
        ranges: list[tuple[int, int]],
        length: int,
        marker: int = END,
    ) -> None:
        self._store = store
        self._length = length
        self._marker = marker
        self._ends = store.learned is None
        self._packed = [pack_range(store, begin, end, length) for begin, end in ranges]
        self.counts = np.array([packed.count for packed in self._packed], np.int64)
        self._masks = store.learned is not None or any(packed.cut for packed in self._packed)

    def cut(self, range_B: NDArray[np.int64], sequence_B: NDArray[np.int64]) -> Batch:
        """Reads the sequences of some numbers, each of a stretch."""
        store = self._store
        shape = (len(range_B), self._length + 1)
        ids_BM = np.full(shape, self._marker, np.int64)
        documents_BM = np.full(shape, store.documents, np.int64)
        learned_BM = np.zeros(shape, bool) if self._masks else None
        valid_BL = np.zeros((shape[0], self._length), bool)
        source_B = None if store.sources is None else np.zeros(shape[0], np.int64)
        for row, (stretch, sequence) in enumerate(
            zip(range_B.tolist(), sequence_B.tolist(), strict=True)
        ):
            packed = self._packed[stretch]
            used = 0
            for piece in range(packed.firsts[sequence], packed.firsts[sequence + 1]):
                begin, size = int(packed.begins[piece]), int(packed.lengths[piece])
                document = int(np.searchsorted(store.starts, begin, side="right")) - 1
                ids_BM[row, used : used + size] = store.tokens[begin : begin + size]
                documents_BM[row, used : used + size] = document
                if learned_BM is not None:
                    learned_BM[row, used : used + size] = self._learned(begin, size)
                if source_B is not None and store.sources is not None and not used:
                    source_B[row] = store.sources[document]
                used += size
            valid_BL[row, : used if self._ends else used - 1] = True
            if learned_BM is not None and self._ends:
                learned_BM[row, used:] = True
        return Batch(
            tokens_BL=torch.from_numpy(np.where(valid_BL, ids_BM[:, :-1], 0)),
            targets_BL=torch.from_numpy(np.where(valid_BL, ids_BM[:, 1:], 0)),
            valid_BL=torch.from_numpy(valid_BL),
            documents_BM=torch.from_numpy(documents_BM),
            learned_BM=None if learned_BM is None else torch.from_numpy(learned_BM),
            source_B=None if source_B is None else torch.from_numpy(source_B),
        )

    def _learned(self, begin: int, size: int) -> NDArray[np.bool_]:
        """Which tokens of a piece are learned where they are targets."""
        learned = np.ones(size, bool)
        if self._store.learned is not None:
            learned = self._store.learned[begin : begin + size].astype(bool)
        place = int(np.searchsorted(self._store.starts, begin))
        starts_here = place < self._store.documents and self._store.starts[place] == begin
        learned[0] &= bool(starts_here)
        return learned

    def note(self) -> str:
        """A line about the sequences: how many there are, the share of padding, and how many documents are cut."""
        predicted = 0
        cut = 0
        for packed in self._packed:
            used = np.add.reduceat(packed.lengths, packed.firsts[:-1]) if packed.count else 0
            predicted += int(np.minimum(used if self._ends else used - 1, self._length).sum())
            cut += packed.cut
        count = int(self.counts.sum())
        share = 1 - predicted / max(count * self._length, 1)
        return (
            f"  packing best_fit: {count:,} sequences, {share:.2%} of their places are padding, "
            f"{cut:,} of {self._store.documents:,} documents are longer than a sequence and cut"
        )
