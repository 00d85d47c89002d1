"""Turns a corpus into a tokenizer and token stores, from the cache where nothing has changed.

Every start reads and hashes the whole corpus: that makes the cache safe, and it costs less than a tenth of a second
for 12 MB. Training the tokenizer and encoding, which cost seconds, happen once. Nothing here imports torch, so an
error in the data is reported before anything heavy is imported.
"""

from collections.abc import Iterator
from pathlib import Path

from core.contracts.corpus import Corpus, Document, TokenCorpus
from core.data import cache
from core.data.documents import CorpusSplit, bytes_in, fingerprint, read_split, text_of
from core.data.prepared import Prepared
from core.data.store import TokenStore, open_store, pack
from core.data.token_blocks import prepare_tokens
from core.data.tokenizer import VERSION, Tokenizer, train

FORMAT = 1
"""Raise this when the way in which tokens are packed changes: old cache entries are then not found."""

AT_ONCE = 64
"""Documents that are encoded together: enough for every core, few enough that their encodings fit in memory."""


def prepare(corpus: Corpus, vocab: int) -> Prepared:
    """Reads a corpus and returns it as tokens.

    Raises:
        UserError: the corpus cannot be read, the vocabulary does not fit it, or the cache cannot be written.
    """
    if isinstance(corpus, TokenCorpus):
        return prepare_tokens(corpus, vocab)
    split = read_split(corpus)
    key = fingerprint(split.documents, FORMAT, VERSION, vocab)
    folder = cache.cache_folder() / key
    cache.ensure(folder, lambda: _files(split, vocab))
    return Prepared(
        tokenizer=Tokenizer.load(folder / "tokenizer.json"),
        train=_open(folder, "train", split.train),
        validation=_open(folder, "validation", split.validation),
        fingerprint=key,
        dropped=split.dropped,
    )


def _files(split: CorpusSplit, vocab: int) -> dict[str, cache.Writer]:
    """The writers of the entry's files: the tokenizer, and for each side its tokens and where documents start."""
    tokenizer = train(map(text_of, split.train), vocab)
    files: dict[str, cache.Writer] = {
        "tokenizer.json": lambda stream: stream.write(tokenizer.to_json().encode())
    }
    for side, documents in (("train", split.train), ("validation", split.validation)):
        tokens, starts = pack(_encoded(tokenizer, documents), vocab)
        files[f"{side}.tokens.npy"] = cache.array_writer(tokens)
        files[f"{side}.starts.npy"] = cache.array_writer(starts)
    return files


def _encoded(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[list[int]]:
    for first in range(0, len(documents), AT_ONCE):
        texts = [text_of(document) for document in documents[first : first + AT_ONCE]]
        yield from tokenizer.encode_batch(texts)


def _open(folder: Path, side: str, documents: list[Document]) -> TokenStore:
    tokens = folder / f"{side}.tokens.npy"
    starts = folder / f"{side}.starts.npy"
    return open_store(tokens, starts, bytes_in(documents))
