"""Cutting a stream into sequences, and the order in which a run reads them.

Sequence i reads L inputs from token i*L on, and its targets one token further: neighbours share one token, so
every token but the first is predicted once. An epoch is a permutation of the sequences. A run is one endless
line of epochs, cut into micro-batches of S sequences for all ranks together; each rank takes its own rows of each.
Every place is arithmetic on (seed, position), so any micro-batch can be made without the ones before it, and one
rank and eight read the same global batches.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from core.contracts.errors import UserError
from core.data.batch import Batch
from core.data.store import TokenStore


def count_sequences(tokens: int, length: int, where: str = "") -> int:
    """The number of whole sequences in a stretch of a training stream; an incomplete one at its end is left out.

    Args:
        tokens: the length of the stretch.
        length: tokens in a sequence.
        where: which stretch, in the error message.

    Raises:
        UserError: the stretch is shorter than one sequence.
    """
    count = (tokens - 1) // length
    if count < 1:
        raise UserError(
            f"the corpus is too short: {tokens} training tokens{where}, and one sequence of "
            f"data.sequence_length = {length} needs {length + 1}"
        )
    return count


def rows_of(rank: int, world: int, sequences: int) -> range:
    """The rows of a global batch that one rank reads.

    Raises:
        UserError: the rows cannot be shared equally.
    """
    if sequences % world:
        raise UserError(
            f"a batch of {sequences} sequences cannot be shared equally by {world} data ranks"
        )
    share = sequences // world
    return range(rank * share, (rank + 1) * share)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int, part: int = 0) -> NDArray[np.int64]:
    """A permutation of `count` sequences, fixed by (seed, epoch, part).

    The sequences are sorted by raw PCG64 words. Numpy guarantees that stream across versions, but not the one of
    `Generator.permutation`, and a run must be able to resume with another version of numpy.
    """
    key = (epoch, part) if part else (epoch,)
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(words, kind="stable")


def sequences_at(
    positions: NDArray[np.int64], seed: int, count: int, part: int = 0
) -> NDArray[np.int64]:
    """The sequence at each position of the endless line of a part's epochs; both arrays are (B,)."""
    epochs, places = np.divmod(positions, count)
    chosen = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = epoch_order(seed, int(epoch), count, part)[places[here]]
    return chosen


def source_ranges(store: TokenStore) -> list[tuple[int, int]]:
    """The first token of each source and the one past its last, for a stream that holds one source after the other."""
    if store.sources is None:
        return [(0, len(store))]
    ends = [*store.starts[1:].tolist(), len(store)]
    found: dict[int, tuple[int, int]] = {}
    for source, begin, end in zip(store.sources.tolist(), store.starts.tolist(), ends, strict=True):
        found[source] = (found.get(source, (begin, end))[0], end)
    return [found.get(source, (0, 0)) for source in range(max(found, default=-1) + 1)]


def cut(
    store: TokenStore,
    begins_B: NDArray[np.int64],
    length: int,
    ends_B: NDArray[np.int64] | None = None,
) -> Batch:
    """Cuts out the sequences that begin at some tokens of a stream.

    A position without a next token is padding: token and target 0, and a document number past the last. A sequence's
    source is that of its first token.

    Args:
        store: the stream.
        begins_B: where each sequence begins.
        length: tokens in a sequence.
        ends_B: where the part of the stream ends that a sequence may read; None: the whole stream.
    """
    ends_B1 = np.full((len(begins_B), 1), len(store)) if ends_B is None else ends_B[:, None]
    positions_BM = begins_B[:, None] + np.arange(length + 1)
    exists_BM = positions_BM < ends_B1
    nearest_BM = np.minimum(positions_BM, ends_B1 - 1)
    valid_BL = positions_BM[:, 1:] < ends_B1
    ids_BM = store.tokens[nearest_BM].astype(np.int64)
    documents_BM = np.searchsorted(store.starts, positions_BM, side="right") - 1
    learned_BM = None
    if store.learned is not None:
        learned_BM = torch.from_numpy(store.learned[nearest_BM] & exists_BM)
    source_B = None
    if store.sources is not None:
        first_documents_B = np.minimum(documents_BM[:, 0], store.documents - 1)
        source_B = torch.from_numpy(store.sources[first_documents_B])
    return Batch(
        tokens_BL=torch.from_numpy(np.where(valid_BL, ids_BM[:, :-1], 0)),
        targets_BL=torch.from_numpy(np.where(valid_BL, ids_BM[:, 1:], 0)),
        valid_BL=torch.from_numpy(valid_BL),
        documents_BM=torch.from_numpy(np.where(exists_BM, documents_BM, store.documents)),
        learned_BM=learned_BM,
        source_B=source_B,
    )
