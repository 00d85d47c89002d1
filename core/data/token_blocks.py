"""Preparing a corpus of tokens: checked, hashed and packed, with the masks and sources of its targets."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from core.contracts.corpus import Split, TokenBlock, TokenCorpus
from core.contracts.errors import UserError
from core.data import cache
from core.data.prepared import Prepared
from core.data.store import TokenStore, join, open_store
from core.data.tokenizer import Tokenizer

FORMAT = 1
"""Raise this when the way in which blocks are packed changes: old cache entries are then not found."""


def prepare_tokens(corpus: TokenCorpus, vocab: int) -> Prepared:
    """Reads a corpus of tokens into token stores.

    Raises:
        UserError: `vocab` is not the corpus's vocabulary, a block is empty, has an id outside of it or a mask of
            another length, there is no training block, or the cache cannot be written.
    """
    if corpus.vocabulary != vocab:
        allowed = corpus.vocabulary
        known = f"the vocabulary of this corpus has {allowed} entries"
        raise UserError(f"data.tokenizer.vocab = {vocab}: {known}, so it must be {allowed}")
    found = {split: _survey(corpus.blocks(split), vocab, split) for split in get_args(Split)}
    if not found["train"].blocks:
        raise UserError("the corpus is empty: it has no block to train on")
    tokenizer = corpus.tokenizer_json()
    digest = hashlib.sha256(f"tokens {FORMAT} {vocab}".encode())
    parts = [tokenizer.encode(), *(survey.digest.digest() for survey in found.values())]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    folder = cache.cache_folder() / digest.hexdigest()
    cache.ensure(folder, lambda: _files(corpus, tokenizer, vocab, found))
    return Prepared(
        tokenizer=Tokenizer.load(folder / "tokenizer.json"),
        train=_open(folder, "train", found["train"]),
        validation=_open(folder, "validation", found["validation"]),
        fingerprint=digest.hexdigest(),
        dropped=0,
    )


@dataclass
class _Survey:
    """The hash and the counts of one side of the split, from one pass over its blocks."""

    digest: Any = field(default_factory=hashlib.sha256)
    blocks: int = 0
    text_bytes: int = 0


def _survey(blocks: Iterable[TokenBlock], vocab: int, split: str) -> _Survey:
    found = _Survey()
    for block in blocks:
        tokens, learned = _arrays(block, vocab, f"{split} block {found.blocks}")
        header = f"{len(tokens)} {block.source} {block.text_bytes} {block.learned is None};"
        found.digest.update(header.encode())
        found.digest.update(tokens.tobytes() + learned.tobytes())
        found.blocks += 1
        found.text_bytes += block.text_bytes
    return found


def _arrays(
    block: TokenBlock, vocab: int, name: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """A block's ids and mask, checked."""
    tokens = np.asarray(block.tokens, dtype=np.int64)
    if not len(tokens):
        raise UserError(f"the corpus's {name} is empty")
    if tokens.min() < 0 or tokens.max() >= vocab:
        worst = tokens.max() if tokens.max() >= vocab else tokens.min()
        raise UserError(
            f"the corpus's {name} holds the id {worst}, which is not in a vocabulary of {vocab}"
        )
    if block.learned is None:
        learned = np.ones(len(tokens), bool)
    else:
        learned = np.asarray(block.learned, dtype=bool)
    if len(learned) != len(tokens):
        raise UserError(
            f"the corpus's {name} has {len(tokens)} tokens and a mask of {len(learned)}"
        )
    return tokens, learned


def _files(
    corpus: TokenCorpus, tokenizer: str, vocab: int, expected: dict[Split, _Survey]
) -> dict[str, cache.Writer]:
    """The writers of the entry's files.

    For each split: its tokens, where blocks start, which tokens are learned, and sources.
    """
    files: dict[str, cache.Writer] = {
        "tokenizer.json": lambda stream: stream.write(tokenizer.encode())
    }
    for split in get_args(Split):
        blocks = list(corpus.blocks(split))
        if _survey(blocks, vocab, split).digest.digest() != expected[split].digest.digest():
            raise UserError(
                f"the corpus's {split} blocks differ between two readings; they must come in one order"
            )
        ids = []
        masks = [np.empty(0, bool)]
        for index, block in enumerate(blocks):
            tokens, learned = _arrays(block, vocab, f"{split} block {index}")
            ids.append(tokens)
            masks.append(learned)
        packed, starts = join(ids, vocab)
        files[f"{split}.tokens.npy"] = cache.array_writer(packed)
        files[f"{split}.starts.npy"] = cache.array_writer(starts)
        files[f"{split}.learned.npy"] = cache.array_writer(np.concatenate(masks))
        sources = np.array([block.source for block in blocks], np.int64)
        files[f"{split}.sources.npy"] = cache.array_writer(sources)
    return files


def _open(folder: Path, split: str, survey: _Survey) -> TokenStore:
    return open_store(
        folder / f"{split}.tokens.npy",
        folder / f"{split}.starts.npy",
        survey.text_bytes,
        learned=folder / f"{split}.learned.npy",
        sources=folder / f"{split}.sources.npy",
    )
