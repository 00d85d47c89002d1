"""Turns a corpus into a tokenizer and token stores, from the cache where nothing has changed.

Every start reads and hashes the whole corpus, in about 0.2 s for 12 MB: so a cache is never used for documents that
have changed. Training the tokenizer and encoding take seconds and happen once. Nothing here imports torch.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from core.contracts.corpus import Corpus, Document, TokenCorpus
from core.data import cache
from core.data.documents import CorpusSplit, bytes_in, fingerprint, read_split, text_of
from core.data.prepared import Prepared
from core.data.recorded import RecordedData, identity, list_documents
from core.data.store import TokenStore, open_store, pack
from core.data.token_blocks import prepare_tokens
from core.data.tokenizer import LONGEST_PIECE, Tokenizer, has_long_piece, train

AT_ONCE = 64
"""Documents that are encoded together: enough for every core, few enough that their encodings fit in memory."""


def prepare(corpus: Corpus, vocab: int, recorded: RecordedData | None = None) -> Prepared:
    """Reads a corpus and returns it as tokens.

    Args:
        corpus: the source of the documents, or of tokens.
        vocab: entries of the tokenizer.
        recorded: the data of the run that reads the corpus again; its tokenizer then makes the tokens.

    Raises:
        UserError: the corpus cannot be read or is not the recorded one, the vocabulary does not fit it, or the cache
            cannot be written.
    """
    if isinstance(corpus, TokenCorpus):
        return _checked(prepare_tokens(corpus, vocab), recorded)
    split = read_split(corpus)
    if recorded is not None:
        recorded.check_documents(split.documents, vocab, split.shift_at)
    key = identity(split.documents, vocab, shift_at=split.shift_at)
    folder = _entry(key, split, vocab, recorded)
    return Prepared(
        tokenizer=Tokenizer.load(folder / "tokenizer.json"),
        train=_with_shift(_open(folder, "train", split.train), split.first_part),
        validation=_open(folder, "validation", split.validation),
        fingerprint=key,
        dropped=split.dropped,
        documents=list_documents(split.documents),
        shift_at=split.shift_at,
    )


def _with_shift(store: TokenStore, first_part: int | None) -> TokenStore:
    """The training stream with the place where part 1 begins, after the documents of part 0."""
    if first_part is None:
        return store
    starts = [*store.starts.tolist(), len(store)]
    return replace(store, shift=starts[first_part])


def _checked(prepared: Prepared, recorded: RecordedData | None) -> Prepared:
    """The data of a corpus of tokens, after a comparison with what a run recorded."""
    if recorded is not None:
        recorded.check_fingerprint(prepared.fingerprint)
    return prepared


def _entry(key: str, split: CorpusSplit, vocab: int, recorded: RecordedData | None) -> Path:
    """The cache entry of the documents' tokens, which is made if it does not exist.

    The tokens of a recorded run share the entry if its tokenizer is the one that is trained here, as it nearly always
    is. A tokenizer that another version of the library or of this program has trained may differ; its tokens then have
    another entry.
    """
    if any(has_long_piece(text_of(document)) for document in split.train):
        key = fingerprint([], key, "pieces", LONGEST_PIECE)
    folder = cache.cache_folder() / key
    tokenizer = None if recorded is None else recorded.tokenizer
    if tokenizer is not None and not _has_tokenizer(folder, tokenizer):
        folder = cache.cache_folder() / fingerprint([], key, tokenizer.to_json())
    cache.ensure(folder, lambda: _files(split, tokenizer, vocab))
    return folder


def _has_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a cache entry exists and its tokens are those of a tokenizer."""
    if not cache.intact(folder):
        return False
    return Tokenizer.load(folder / "tokenizer.json").to_json() == tokenizer.to_json()


def _files(split: CorpusSplit, recorded: Tokenizer | None, vocab: int) -> dict[str, cache.Writer]:
    """The writers of an entry's files: the tokenizer, and for each side its tokens and where documents start.

    Args:
        split: the documents.
        recorded: the tokenizer that a run has recorded, with which they are encoded; None: one is trained on them.
        vocab: entries of the tokenizer.
    """
    tokenizer = recorded or train(map(text_of, split.train), vocab)
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
