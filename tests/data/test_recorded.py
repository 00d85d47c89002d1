"""What makes a corpus the one that a run began with: its documents and the run's own tokenizer, nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeCorpus

from core.contracts.errors import UserError
from core.data.held_out import read_split
from core.data.prepare import prepare
from core.data.recorded import (
    RecordedData,
    document_hash,
    identity,
    list_documents,
    read_documents,
)
from core.data.tokenizer import train

VOCAB = 300
Texts = dict[str, bytes]


def recorded(make: MakeCorpus, texts: Texts, *, listed: bool = True) -> RecordedData:
    """What a run on these texts with a version of `tokenizers` long ago would have recorded."""
    documents = read_split(make(texts)).documents
    return RecordedData(
        folder=Path("runs/old"),
        fingerprint=identity(documents, VOCAB, "0.0.1"),
        version="0.0.1",
        tokenizer=prepare(make(texts), VOCAB).tokenizer,
        documents=read_documents(list_documents(documents) or "") if listed else None,
    )


def test_another_version_of_the_library_is_no_other_corpus(
    corpus_of: MakeCorpus, texts: Texts
) -> None:
    new = prepare(corpus_of(texts), VOCAB)
    again = prepare(corpus_of(texts), VOCAB, recorded(corpus_of, texts))
    assert np.array_equal(again.train.tokens, new.train.tokens)


def test_tokens_are_made_with_the_runs_own_tokenizer(
    corpus_of: MakeCorpus, texts: Texts, cache: Path
) -> None:
    """As if the version of long ago had trained another tokenizer."""
    own = train(["zz yy xx " * 50, *(text.decode() for text in texts.values())][:9], VOCAB)
    old = recorded(corpus_of, texts)
    old = RecordedData(old.folder, old.fingerprint, old.version, own, old.documents)
    for _ in range(2):
        data = prepare(corpus_of(texts), VOCAB, old)
        assert data.tokenizer.to_json() == own.to_json()
        first = data.train.tokens[1 : data.train.starts[1]].tolist()
        assert first == own.encode(texts["doc-00"].decode())
    assert len(list(cache.iterdir())) == 2
    assert prepare(corpus_of(texts), VOCAB).tokenizer.to_json() != own.to_json()


CHANGES: dict[str, tuple[Callable[[Texts], object], str]] = {
    "changed": (
        lambda texts: texts.update({"doc-07": b"other"}),
        "document 'doc-07' (/texts/doc-07) has another text",
    ),
    "added": (
        lambda texts: texts.update({"doc-07b": b"new"}),
        "document 'doc-07b' (/texts/doc-07b) was added",
    ),
    "removed": (lambda texts: texts.pop("doc-07"), "document 'doc-07' is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_document_that_differs_is_named(
    corpus_of: MakeCorpus, texts: Texts, change: str
) -> None:
    old = recorded(corpus_of, texts)
    make_change, sentence = CHANGES[change]
    make_change(texts)
    with pytest.raises(UserError) as error:
        prepare(corpus_of(texts), VOCAB, old)
    begin = "runs/old: the corpus has changed since this run began: "
    assert str(error.value) == f"{begin}{sentence}"


def test_without_a_list_the_fingerprints_are_named(corpus_of: MakeCorpus, texts: Texts) -> None:
    old = recorded(corpus_of, texts, listed=False)
    with pytest.raises(UserError, match=f"its fingerprint is .*, and was {old.fingerprint[:12]}"):
        prepare(corpus_of(texts | {"doc-07": b"other"}), VOCAB, old)


def test_a_list_is_read_as_it_was_written(corpus_of: MakeCorpus) -> None:
    documents = read_split(corpus_of({"a  b\u2028": b"x", "c.jsonl:000000001": b"y"})).documents
    listed = list_documents(documents)
    assert listed is not None
    assert read_documents(listed) == {one.name: document_hash(one) for one in documents}


def test_long_lists_are_not_kept(
    corpus_of: MakeCorpus, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.data.recorded.MOST_LISTED", 24)
    assert prepare(corpus_of(texts), VOCAB).documents is None


def test_a_name_that_is_no_text_is_identified_and_not_listed(corpus_of: MakeCorpus) -> None:
    documents = read_split(corpus_of({"a": b"one", "b-\udcff": b"two"})).documents
    assert list_documents(documents) is None
    assert identity(documents, VOCAB) != identity(list(documents)[:1], VOCAB)
