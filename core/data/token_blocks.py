"""Preparing a corpus of tokens: checked, hashed and packed, with the masks and sources of its targets."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
from numpy.typing import NDArray

from core.contracts.corpus import Split, TokenBlock, TokenCorpus
from core.contracts.errors import UserError
from core.data import cache
from core.data.prepared import Prepared
from core.data.store import TokenStore, open_store, width_of, write_header
from core.data.tokenizer import Tokenizer

FORMAT = 1
"""Raise this when the way in which blocks are packed changes: old cache entries are then not found."""

PIECE = 1 << 22
"""Tokens of a block that are worked on at once."""


def prepare_tokens(corpus: TokenCorpus, vocab: int) -> Prepared:
    """Reads a corpus of tokens into token stores; see `prepare_tokens_by_source`."""
    return prepare_tokens_by_source(corpus, vocab)[0]


def prepare_tokens_by_source(corpus: TokenCorpus, vocab: int) -> tuple[Prepared, dict[int, int]]:
    """Reads a corpus of tokens into token stores, and counts the bytes of validation text by source.

    Raises:
        UserError: `vocab` is not the corpus's vocabulary, a block is empty, has an id outside of it or a mask of
            another length, there is no training block, or the cache cannot be written.
    """
    allowed = corpus.vocabulary
    if allowed is not None and allowed != vocab:
        known = f"the vocabulary of this corpus has {allowed} entries"
        raise UserError(f"data.tokenizer.vocab = {vocab}: {known}, so it must be {allowed}")
    found = {split: _survey(corpus.blocks(split), vocab, split) for split in get_args(Split)}
    if not found["train"].blocks:
        raise UserError("the corpus is empty: it has no block to train on")
    tokenizer = corpus.tokenizer_json()
    digest = hashlib.sha256(f"tokens {FORMAT} {vocab}".encode())
    surveys = [survey.digest.digest() for survey in found.values()]
    parts = [(tokenizer or "").encode(), *surveys]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    folder = cache.cache_folder() / digest.hexdigest()
    cache.ensure(folder, lambda: _files(corpus, tokenizer, vocab, found))
    prepared = Prepared(
        tokenizer=None if tokenizer is None else Tokenizer.load(folder / "tokenizer.json"),
        train=_open(folder, "train", found["train"]),
        validation=_open(folder, "validation", found["validation"]),
        fingerprint=digest.hexdigest(),
        dropped=0,
    )
    return prepared, found["validation"].source_bytes


@dataclass
class _Survey:
    """The hash and the counts of one side of the split, from one pass over its blocks."""

    digest: Any = field(default_factory=hashlib.sha256)
    text_bytes: int = 0
    source_bytes: dict[int, int] = field(default_factory=dict)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    sources: "array[int]" = field(default_factory=lambda: array("q"))

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(self.lengths)


def _survey(blocks: Iterable[TokenBlock], vocab: int, split: str) -> _Survey:
    found = _Survey()
    for block in blocks:
        _check(block, vocab, f"{split} block {found.blocks}")
        header = f"{len(block.tokens)} {block.source} {block.text_bytes} {block.learned is None};"
        found.digest.update(header.encode())
        for piece in _token_pieces(block):
            found.digest.update(piece.tobytes())
        for mask in _mask_pieces(block):
            found.digest.update(mask.tobytes())
        found.lengths.append(len(block.tokens))
        found.sources.append(block.source)
        found.text_bytes += block.text_bytes
        before = found.source_bytes.get(block.source, 0)
        found.source_bytes[block.source] = before + block.text_bytes
    return found


def _check(block: TokenBlock, vocab: int, name: str) -> None:
    """Raises `UserError` for a block that is empty, has an id outside of the vocabulary or a mask of another length."""
    if not len(block.tokens):
        raise UserError(f"the corpus's {name} is empty")
    for piece in _token_pieces(block):
        if piece.min() < 0 or piece.max() >= vocab:
            worst = piece.max() if piece.max() >= vocab else piece.min()
            raise UserError(
                f"the corpus's {name} holds the id {worst}, which is not in a vocabulary of {vocab}"
                " (data.tokenizer.vocab)"
            )
    if block.learned is not None and len(block.learned) != len(block.tokens):
        raise UserError(
            f"the corpus's {name} has {len(block.tokens)} tokens and a mask of {len(block.learned)}"
        )


def _token_pieces(block: TokenBlock) -> Iterator[NDArray[np.int64]]:
    """Yields a block's ids, as many at once as fit in memory."""
    for begin in range(0, len(block.tokens), PIECE):
        yield np.asarray(block.tokens[begin : begin + PIECE]).astype(np.int64)


def _mask_pieces(block: TokenBlock) -> Iterator[NDArray[np.bool_]]:
    """Yields the mask of a block's tokens likewise."""
    for begin in range(0, len(block.tokens), PIECE):
        count = min(PIECE, len(block.tokens) - begin)
        if block.learned is None:
            yield np.ones(count, bool)
        else:
            yield np.asarray(block.learned[begin : begin + PIECE], dtype=bool)


def _files(
    corpus: TokenCorpus, tokenizer: str | None, vocab: int, expected: dict[Split, _Survey]
) -> dict[str, cache.Writer]:
    """The writers of the entry's files.

    For each split: its tokens, where blocks start, which tokens are learned, and sources.
    """
    files: dict[str, cache.Writer] = {}
    if tokenizer is not None:
        files["tokenizer.json"] = lambda stream: stream.write(tokenizer.encode())
    for split in get_args(Split):
        survey = expected[split]
        if _survey(corpus.blocks(split), vocab, split).digest.digest() != survey.digest.digest():
            raise UserError(
                f"the corpus's {split} blocks differ between two readings; they must come in one order"
            )
        files[f"{split}.tokens.npy"] = _writer(
            corpus, split, survey, np.dtype(width_of(vocab)), _token_pieces
        )
        files[f"{split}.learned.npy"] = _writer(corpus, split, survey, np.dtype(bool), _mask_pieces)
        ends = np.cumsum([0, *survey.lengths], dtype=np.int64)
        files[f"{split}.starts.npy"] = cache.array_writer(ends[:-1])
        sources = np.array(survey.sources, np.int64)
        files[f"{split}.sources.npy"] = cache.array_writer(sources)
    return files


def _writer(
    corpus: TokenCorpus,
    split: Split,
    survey: _Survey,
    dtype: np.dtype[Any],
    pieces: Callable[[TokenBlock], Iterator[NDArray[Any]]],
) -> cache.Writer:
    """A writer of one number for each token of a split, as a `.npy` file; nothing is kept in memory."""

    def write(stream: IO[bytes]) -> None:
        write_header(stream, dtype, survey.tokens)
        for block in corpus.blocks(split):
            for piece in pieces(block):
                stream.write(piece.astype(dtype).tobytes())

    return write


def _open(folder: Path, split: str, survey: _Survey) -> TokenStore:
    return open_store(
        folder / f"{split}.tokens.npy",
        folder / f"{split}.starts.npy",
        survey.text_bytes,
        learned=folder / f"{split}.learned.npy",
        sources=folder / f"{split}.sources.npy",
    )
