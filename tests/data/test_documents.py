"""Order, split and hash of a corpus, and error messages when it cannot be read."""

import pytest
from conftest import MakeCorpus

from core.contracts.corpus import Document
from core.contracts.errors import UserError
from core.data.documents import bytes_in, fingerprint
from core.data.held_out import read_split


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def test_every_twentieth_name_from_the_eleventh_is_held_out(corpus_of: MakeCorpus) -> None:
    backwards = {f"doc-{index:02d}": b"text" for index in reversed(range(45))}
    split = read_split(corpus_of(backwards))
    assert names(split.validation) == ["doc-10", "doc-30"]
    assert names(split.train) == [
        f"doc-{index:02d}" for index in range(45) if index not in (10, 30)
    ]


@pytest.mark.parametrize(("count", "held_out"), [(10, 0), (11, 1), (30, 1), (31, 2)])
def test_how_many_documents_it_takes_to_hold_one_out(
    corpus_of: MakeCorpus, count: int, held_out: int
) -> None:
    split = read_split(corpus_of({f"{index:02d}": b"text" for index in range(count)}))
    assert (len(split.train), len(split.validation)) == (count - held_out, held_out)


def test_empty_documents_are_dropped_before_the_split(corpus_of: MakeCorpus) -> None:
    split = read_split(
        corpus_of({"00-empty": b""} | {f"{index:02d}": b"text" for index in range(1, 13)})
    )
    assert split.dropped == 1
    assert names(split.validation) == ["11"]


def test_bytes_are_counted_before_decoding(corpus_of: MakeCorpus) -> None:
    assert bytes_in(read_split(corpus_of({"a": "é€😀".encode()})).documents) == 2 + 3 + 4


@pytest.mark.parametrize(("texts", "expected"), [({}, "0 documents"), ({"a": b""}, "1 document")])
def test_empty_corpus(corpus_of: MakeCorpus, texts: dict[str, bytes], expected: str) -> None:
    with pytest.raises(UserError) as error:
        read_split(corpus_of(texts))
    assert str(error.value) == f"the corpus is empty: {expected}, none with text"


def test_bytes_that_are_not_utf8_are_named_with_their_offset(corpus_of: MakeCorpus) -> None:
    with pytest.raises(UserError) as error:
        read_split(corpus_of({"a": b"good", "b": "né".encode() + b"\xff!"}))
    assert str(error.value) == "/texts/b is not UTF-8: byte 0xff at offset 3 (invalid start byte)"


def test_two_documents_of_one_name_are_refused(corpus_of: MakeCorpus) -> None:
    corpus = corpus_of({})
    corpus.documents = lambda: iter([Document("a", b"1", "/one/a"), Document("a", b"2", "/two/a")])  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"two documents are named 'a' \(/one/a and /two/a\)"):
        read_split(corpus)


def test_fingerprint_sees_names_bytes_order_and_settings() -> None:
    one, two = Document("a", b"bc", "x"), Document("d", b"e", "x")
    base = fingerprint([one, two], 512)
    assert base == fingerprint([Document("a", b"bc", "elsewhere"), two], 512)
    others = [
        fingerprint([two, one], 512),
        fingerprint([one, two], 513),
        fingerprint([Document("ab", b"c", "x"), two], 512),
        fingerprint([one, Document("d", b"f", "x")], 512),
        fingerprint([one], 512),
    ]
    assert len({base, *others}) == 6
