"""Turns a corpus into a tokenizer and token stores, from the cache where nothing has changed.

Every start reads and hashes the whole corpus, in about 0.2 s for 12 MB: so a cache is never used for documents that
have changed. Training the tokenizer and encoding take seconds and happen once. Nothing here imports torch.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from core.contracts.corpus import Corpus, MixtureCorpus
from core.contracts.errors import UserError
from core.data import cache
from core.data.documents import IN_MEMORY, fingerprint, text_of
from core.data.encoding import Encoding, processes_for
from core.data.encoding_progress import EncodingProgress
from core.data.fim import FillInTheMiddle
from core.data.held_out import HeldOut
from core.data.mixed_tokens import MixedTokens, holds_tokens
from core.data.packing import GroupPacker, PackedStream
from core.data.prepared import Prepared, SourceNames
from core.data.recorded import RecordedData
from core.data.run_text import RunText, Side, read_text, shares_of
from core.data.store import TokenStore, open_store, width_of
from core.data.token_blocks import prepare_tokens, prepare_tokens_by_source
from core.data.token_split import TokenSplit
from core.data.tokenizer import LONGEST_PIECE, Tokenizer, sample_every, train
from core.data.unfinished import SUFFIX, keep_bytes, kept_bytes, remove_unfinished
from core.data.with_tokenizer import held_out_with, with_tokenizer


def prepare(
    corpus: Corpus,
    vocab: int,
    recorded: RecordedData | None = None,
    held_out: HeldOut | None = None,
    given: Tokenizer | None = None,
    fim: FillInTheMiddle | None = None,
) -> Prepared:
    """Reads a corpus and returns it as tokens.

    Args:
        corpus: the source of the documents, or of tokens.
        vocab: entries of the vocabulary.
        recorded: the data of the run that reads the corpus again; its tokenizer then makes the tokens.
        held_out: how the validation text is chosen; None: by the documents' names.
        given: the tokenizer that the recipe names; None: one is trained.
        fim: gives a trained tokenizer its markers; documents of text are then rearranged where they are read.

    Raises:
        UserError: the corpus cannot be read or is not the recorded one, the vocabulary does not fit it, or the cache
            cannot be written.
    """
    held_out = held_out_with(held_out or HeldOut(), given)
    corpus = with_tokenizer(corpus, given)
    if fim is not None and holds_tokens(corpus):
        fim.ids(None)
    if isinstance(corpus, MixtureCorpus) and holds_tokens(corpus):
        return _checked(_with_given(_prepare_mixed(corpus, vocab, held_out), given), recorded)
    tokens = corpus.as_tokens()
    if tokens is not None:
        prepared = prepare_tokens(TokenSplit(tokens, held_out), vocab)
        return _checked(_with_given(prepared, given), recorded)
    text = read_text(corpus, vocab, held_out)
    if fim is not None and given is None:
        text = replace(text, markers=fim.tokens)
    if recorded is not None:
        found = _identity(text.identity(recorded.version), given)
        recorded.check_documents(found, text.listed())
    folder = _entry(text, vocab, recorded, given, fim)
    return Prepared(
        tokenizer=given or Tokenizer.load(folder / "tokenizer.json"),
        train=_with_shift(_open(folder, "train", text.train), text.first_part),
        validation=_open(folder, "validation", text.validation),
        fingerprint=_identity(text.identity(), given),
        dropped=sum(source.split.dropped for source in text.sources),
        documents=text.list_text(),
        sources=text.names(),
        shift_at=text.shift_at,
    )


def _identity(key: str, given: Tokenizer | None) -> str:
    """A fingerprint of documents, with that of the tokenizer that the recipe names."""
    return key if given is None else fingerprint([], key, "tokenizer", *given.identity())


def _with_given(prepared: Prepared, given: Tokenizer | None) -> Prepared:
    """The data of a corpus of tokens, with the tokenizer that the recipe names for them.

    Raises:
        UserError: the corpus brings its own.
    """
    if given is None:
        return prepared
    if prepared.tokenizer is not None:
        why = "must be null, because the corpus holds token ids and brings their tokenizer"
        raise UserError(f"data.tokenizer.file: {why}")
    return replace(prepared, tokenizer=given, fingerprint=_identity(prepared.fingerprint, given))


def _with_shift(store: TokenStore, first_part: int | None) -> TokenStore:
    """The training stream with the place where part 1 begins, after the documents of part 0."""
    if first_part is None:
        return store
    starts = [*store.starts.tolist(), len(store)]
    return replace(store, shift=starts[first_part])


def _prepare_mixed(corpus: MixtureCorpus, vocab: int, held_out: HeldOut) -> Prepared:
    """The data of a mixture of tokens, whose identity includes the weights."""
    parts = corpus.parts()
    prepared, sizes = prepare_tokens_by_source(MixedTokens(parts, held_out), vocab)
    weights = shares_of(parts)
    found = tuple(sizes.get(number, 0) for number in range(len(parts)))
    return replace(
        prepared,
        fingerprint=fingerprint([], prepared.fingerprint, *weights),
        sources=SourceNames(tuple(part.name for part in parts), weights, found),
    )


def _checked(prepared: Prepared, recorded: RecordedData | None) -> Prepared:
    """The data of a corpus of tokens, after a comparison with what a run recorded."""
    if recorded is not None:
        recorded.check_fingerprint(prepared.fingerprint)
    return prepared


def _entry(
    text: RunText,
    vocab: int,
    recorded: RecordedData | None,
    given: Tokenizer | None,
    fim: FillInTheMiddle | None,
) -> Path:
    """The cache entry of the documents' tokens, which is made if it does not exist.

    The tokens of a recorded run share the entry if its tokenizer is the one that is trained here, as it nearly always
    is. A tokenizer that another version of the library or of this program has trained may differ; its tokens then have
    another entry.
    """
    key = text.tokens_identity()
    tokenizer = given
    if given is not None:
        folder = cache.cache_folder() / _identity(key, given)
    else:
        key = _trained_identity(key, text)
        folder = cache.cache_folder() / key
        tokenizer = None if recorded is None else recorded.tokenizer
        if tokenizer is not None and not _has_tokenizer(folder, tokenizer):
            folder = cache.cache_folder() / fingerprint([], key, tokenizer.to_json())
    cache.ensure(folder, lambda: _files(text, tokenizer, vocab, fim, folder))
    remove_unfinished(folder)
    return folder


def _trained_identity(key: str, text: RunText) -> str:
    """The hash of documents and of how a tokenizer is trained on them."""
    if text.has_long_piece:
        key = fingerprint([], key, "pieces", LONGEST_PIECE)
    every = sample_every(text.train.size)
    return fingerprint([], key, "every", every) if every > 1 else key


def _has_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a cache entry exists and its tokens are those of a tokenizer."""
    if not cache.intact(folder):
        return False
    return Tokenizer.load(folder / "tokenizer.json").to_json() == tokenizer.to_json()


def _files(
    text: RunText,
    known: Tokenizer | None,
    vocab: int,
    fim: FillInTheMiddle | None,
    folder: Path,
) -> dict[str, cache.Writer]:
    """The writers of an entry's files: the tokenizer, and for each side its tokens and where documents start.

    Args:
        text: the documents.
        known: the tokenizer of a file or of a run, with which they are encoded; None: one is trained on them.
        vocab: entries of the vocabulary.
        fim: the markers of the tokenizer that is trained; None: none.
        folder: the entry's, which keeps what is encoded of a large text until everything is.
    """
    size = text.train.size + text.validation.size
    kept = folder if size > IN_MEMORY else None
    tokenizer = known or _trained(text, vocab, fim, kept)
    content = tokenizer.to_json().encode()
    files: dict[str, cache.Writer] = {"tokenizer.json": lambda stream: stream.write(content)}
    dtype = np.dtype(width_of(vocab))
    with (
        Encoding(tokenizer, dtype, processes_for(size)) as encoding,
        EncodingProgress(size) as progress,
    ):
        packer = GroupPacker(encoding, dtype, progress, tokenizer=tokenizer, folder=kept)
        for name, side in (("train", text.train), ("validation", text.validation)):
            packed = PackedStream(dtype)
            for number, documents in side.documents:
                for group in packer.pack(documents):
                    packed.add(group, number)
            files[f"{name}.tokens.npy"] = packed.write
            files[f"{name}.starts.npy"] = cache.array_writer(packed.starts())
            if side.has_sources:
                files[f"{name}.sources.npy"] = cache.array_writer(packed.sources())
    return files


def _trained(
    text: RunText, vocab: int, fim: FillInTheMiddle | None, folder: Path | None
) -> Tokenizer:
    """A tokenizer that is trained on the training documents, or on every n-th one of a large text.

    Args:
        text: the documents.
        vocab: entries of the tokenizer.
        fim: has the markers that are its last entries; None: there are none.
        folder: keeps the tokenizer until the tokens are made; None: nothing is kept.
    """
    file = None if folder is None else folder / f"tokenizer{SUFFIX}"
    content = None if file is None else kept_bytes(file)
    if content is not None:
        return Tokenizer.parse(content.decode())
    entries = vocab if fim is None else fim.trained_vocabulary(vocab)
    every = sample_every(text.train.size)
    tokenizer = train(_training_texts(text, every), entries, bounded=text.has_long_piece)
    if fim is not None:
        tokenizer = fim.with_markers(tokenizer)
    if file is not None:
        keep_bytes(file, tokenizer.to_json().encode())
    return tokenizer


def _training_texts(text: RunText, every: int) -> Iterator[str]:
    documents = chain.from_iterable(documents for _, documents in text.train.documents)
    yield from map(text_of, islice(documents, 0, None, every))


def _open(folder: Path, name: str, side: Side) -> TokenStore:
    sources = folder / f"{name}.sources.npy" if side.has_sources else None
    return open_store(
        folder / f"{name}.tokens.npy", folder / f"{name}.starts.npy", side.size, sources=sources
    )
