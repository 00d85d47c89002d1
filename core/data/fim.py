"""Fill-in-the-middle: some training documents are rearranged, so that a model learns to write between two texts.

A document is cut at two places into a prefix, a middle and a suffix and reads

    <|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle

(PSM: prefix, suffix, middle), as in DeepSeek-V3 (arXiv 2412.19437, section 4.1; DeepSeek-Coder, arXiv 2401.14196),
where it happens to a tenth of the documents before they are packed. Both cuts are drawn evenly (arXiv 2207.14255). The
stream has an end marker before each document, which ends the middle of the one before, as the report's
`<|eos_token|>` does.

Here the cuts lie between tokens, because documents are rearranged when they are read: the tokens on disk stay as they
are. The papers cut between characters and encode the three parts by themselves. Which documents are rearranged, and
where they are cut, depends on the seed and on the document's place in the corpus alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken

from core.contracts.errors import UserError
from core.data.store import TokenStore
from core.data.tokenizer import END_TEXT, SMALLEST, Tokenizer

MARKERS = 3
"""Tokens that a rearranged document has more."""

MOST_SHOWN = 40
"""Special tokens that an error message names at most."""

STREAM = (0xF1, 0x11, 0x11)
"""The spawn key of the random words: another length than those of the order of sequences, so another stream."""


@dataclass(frozen=True)
class FillInTheMiddle:
    """How training documents are rearranged.

    Args:
        rate: the share of documents.
        tokens: the texts of the three markers: before the prefix, the suffix and the middle.
    """

    rate: float
    tokens: tuple[str, ...]

    def trained_vocabulary(self, vocab: int) -> int:
        """The entries of the tokenizer that is trained: the markers are the last ids of the vocabulary.

        Raises:
            UserError: the vocabulary has no place for them.
        """
        left = vocab - MARKERS
        if left < SMALLEST:
            least = f"it must be at least {SMALLEST + MARKERS}"
            parts = f"256 bytes, {END_TEXT} and the {MARKERS} markers of data.fim"
            raise UserError(f"data.tokenizer.vocab = {vocab} is too small: {least} ({parts})")
        return left

    def with_markers(self, tokenizer: Tokenizer) -> Tokenizer:
        """A tokenizer with the markers as its last entries; text that spells one out is still encoded as text."""
        engine = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        known = engine.get_vocab(with_added_tokens=True)
        for text in self.tokens:
            if text in known:
                why = "is an entry of the tokenizer already; choose another text"
                raise UserError(f"data.fim.tokens: {text!r} {why}")
        engine.add_special_tokens([AddedToken(t, special=True) for t in self.tokens])
        return Tokenizer(engine)

    def ids(self, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        """The ids of the markers in a tokenizer.

        Raises:
            UserError: there is no tokenizer, or it lacks one of them.
        """
        if tokenizer is None:
            why = "must be null for a corpus of token ids or of conversations"
            raise UserError(f"data.fim: {why}; documents of text can be rearranged")
        added = {text: number for number, text in tokenizer.entries()[2].items()}
        for text in self.tokens:
            if text not in added:
                where = "the tokenizer" if tokenizer.source is None else str(tokenizer.source)
                known = ", ".join(sorted(added)[:MOST_SHOWN]) or "none"
                raise UserError(
                    f"data.fim.tokens: {text!r} is no special token of {where}, which has {known}"
                )
        return tuple(added[text] for text in self.tokens)


@dataclass(frozen=True)
class Cuts:
    """Where documents are cut.

    Args:
        chosen: (D,) which documents are rearranged.
        first: (D,) tokens before the first cut, the document's marker not counted.
        second: (D,) tokens before the second cut.
    """

    chosen: NDArray[np.bool_]
    first: NDArray[np.int64]
    second: NDArray[np.int64]


def draw_cuts(sizes: NDArray[np.int64], rate: float, seed: int) -> Cuts:
    """Draws which documents are rearranged, and their cuts.

    Args:
        sizes: (D,) tokens of each document, its marker not counted.
        rate: the share that is rearranged.
        seed: the recipe's.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=STREAM))
    words_D3 = words.random_raw(3 * len(sizes)).reshape(-1, 3)
    # 53 bits, as doubles have them: all of them are compared exactly
    chosen = (words_D3[:, 0] >> np.uint64(11)) * 2.0**-53 < rate
    places_D2 = (words_D3[:, 1:] % (sizes[:, None] + 1).astype(np.uint64)).astype(np.int64)
    places_D2.sort(axis=1)
    return Cuts(chosen, places_D2[:, 0], places_D2[:, 1])


class RearrangedTokens:
    """The tokens of a stream with some documents rearranged, computed where they are read.

    Args:
        store: the stream, with a marker before each document.
        cuts: which documents are rearranged, and where they are cut.
        ids: the markers before prefix, suffix and middle.
    """

    def __init__(self, store: TokenStore, cuts: Cuts, ids: Sequence[int]) -> None:
        self._tokens = store.tokens
        self._begins = store.starts
        self._cuts = cuts
        self._ids = ids
        ends = np.append(store.starts[1:], len(store))
        self._sizes = ends - store.starts - 1
        added = np.cumsum(MARKERS * cuts.chosen.astype(np.int64))
        self.starts = store.starts + added - MARKERS * cuts.chosen
        self._length = len(store) + (int(added[-1]) if len(added) else 0)

    @property
    def rearranged(self) -> int:
        """How many documents are rearranged."""
        return int(self._cuts.chosen.sum())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: Any) -> NDArray[np.int64]:
        """The tokens at some places, or in a slice."""
        if isinstance(places, slice):
            places = np.arange(*places.indices(self._length))
        places = np.asarray(places)
        documents = np.searchsorted(self.starts, places, side="right") - 1
        offsets = places - self.starts[documents]
        sources, markers = self._sources(documents, offsets)
        read = self._tokens[self._begins[documents] + sources].astype(np.int64)
        return np.where(markers >= 0, np.take(self._ids, markers), read)

    def _sources(
        self, documents: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The offset in the stored document of each place, and which marker is there; -1: none."""
        first = self._cuts.first[documents]
        second = self._cuts.second[documents]
        sizes = self._sizes[documents]
        chosen = self._cuts.chosen[documents]
        hole = 2 + first
        end = hole + 1 + sizes - second
        markers = np.full(offsets.shape, -1)
        for number, place in enumerate((1, hole, end)):
            markers[chosen & (offsets == place)] = number
        # prefix, suffix and middle, each moved by the markers and parts before it
        moved = np.where(offsets < hole, offsets - 1, offsets - hole + second)
        moved = np.where(offsets > end, offsets - end + first, moved)
        inside = chosen & (offsets > 0) & (markers < 0)
        sources = np.where(inside, moved, offsets)
        return np.where(markers >= 0, 0, sources), markers


def rearrange(store: TokenStore, fim: FillInTheMiddle, ids: Sequence[int], seed: int) -> TokenStore:
    """A training stream with some of its documents rearranged.

    Args:
        store: a stream of documents of text.
        fim: how.
        ids: the markers before prefix, suffix and middle.
        seed: the recipe's.
    """
    sizes = np.diff(np.append(store.starts, len(store))) - 1
    cuts = draw_cuts(sizes, fim.rate, seed)
    tokens = RearrangedTokens(store, cuts, ids)
    shift = store.shift
    if shift is not None:
        before = int(cuts.chosen[: np.searchsorted(store.starts, shift)].sum())
        shift += MARKERS * before
    return replace(store, tokens=tokens, starts=tokens.starts, shift=shift)  # type: ignore[arg-type]
