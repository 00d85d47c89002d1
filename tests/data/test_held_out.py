"""The validation split by a fraction and by a corpus of its own; a large corpus that is not kept in memory."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import MakeCorpus

from core.contracts.corpus import Corpus, Document, Split, TokenBlock, TokenCorpus
from core.contracts.errors import UserError
from core.data import documents as documents_module
from core.data import encoding, packing
from core.data import prepare as prepare_module
from core.data.documents import read_all
from core.data.held_out import HeldOut, cut_text, read_split
from core.data.prepare import prepare
from core.data.prepared import Prepared
from core.data.recorded import RecordedData, read_documents
from core.data.tokenizer import Tokenizer, train

VOCAB = 300


def names(documents: Iterator[Document]) -> list[str]:
    return [document.name for document in documents]


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(25, 0.2, 5), (25, 0.999, 24), (10, 0.1, 1)]
)
def test_a_fraction_of_the_documents_is_held_out(
    corpus_of: MakeCorpus, count: int, fraction: float, held: int
) -> None:
    corpus = corpus_of({f"{index:02d}": b"text" for index in range(count)})
    split = read_split(corpus, HeldOut(fraction))
    assert (len(split.train), len(split.validation)) == (count - held, held)
    both = [*names(iter(split.train)), *names(iter(split.validation))]
    assert sorted(both) == [f"{index:02d}" for index in range(count)]


def test_few_documents_move_when_others_are_added(corpus_of: MakeCorpus) -> None:
    def held(count: int) -> set[str]:
        corpus = corpus_of({f"{index:03d}": b"text" for index in range(count)})
        return set(names(iter(read_split(corpus, HeldOut(0.1)).validation)))

    assert len(held(200) & held(210)) >= 18


def test_too_few_documents_are_cut_at_their_ends(corpus_of: MakeCorpus) -> None:
    texts = {"a": b"one two three four\n" * 50, "b": "é".encode() * 500}
    split = read_split(corpus_of(texts), HeldOut(0.1))
    assert len(split.train) == len(split.validation) == 2
    for before, end in zip(split.train, split.validation, strict=True):
        assert before.data + end.data == texts[before.name]
        assert 0.1 <= len(end.data) / len(texts[before.name]) < 0.13
        before.data.decode()
    assert next(iter(split.train)).data.endswith(b"\n")
    assert split.train.size + split.validation.size == sum(map(len, texts.values()))


@pytest.mark.parametrize("data", ["a", "é", "x" * 1000, "a b " * 300, "€" * 7])
def test_a_cut_is_never_within_a_character(data: str) -> None:
    before, end = cut_text(Document("a", data.encode(), "a"), 0.25)
    assert before.decode() + end.decode() == data
    assert end


def test_a_fraction_is_part_of_the_datas_identity(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    corpus = corpus_of(texts)
    prints = [prepare(corpus, VOCAB, None, HeldOut(f)).fingerprint for f in (None, 0.1, 0.2)]
    assert len(set(prints)) == 3
    assert prints[0] == prepare(corpus, VOCAB).fingerprint


def test_a_validation_corpus_takes_nothing_from_the_other(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    data = prepare(corpus_of(texts), VOCAB, None, HeldOut(corpus=corpus_of({"v": b"held out"})))
    assert (data.train.documents, data.validation.documents) == (25, 1)
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.validation.tokens[1:].tolist()) == "held out"
    assert data.validation.bytes == 8
    assert read_documents(data.documents or "").keys() == {*texts, "validation/v"}
    other = prepare(corpus_of(texts), VOCAB, None, HeldOut(corpus=corpus_of({"v": b"other"})))
    assert other.fingerprint != data.fingerprint
    recorded = RecordedData(
        Path("run"), data.fingerprint, "0.0.1", data.tokenizer, read_documents(data.documents or "")
    )
    with pytest.raises(UserError, match=r"document 'validation/v' .* has another text"):
        prepare(corpus_of(texts), VOCAB, recorded, HeldOut(corpus=corpus_of({"v": b"other"})))


class Blocks(TokenCorpus):
    """Blocks of ids from 0 to 9, without a tokenizer."""

    def __init__(self, train: list[list[int]], validation: list[list[int]] = []) -> None:  # noqa: B006
        super().__init__(None)
        self.sides = {"train": train, "validation": validation}

    @property
    def vocabulary(self) -> int | None:
        return None

    def tokenizer_json(self) -> str | None:
        return None

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        for ids in self.sides[split]:
            yield TokenBlock(ids)


def tokens_of(data: Prepared) -> tuple[list[int], list[int]]:
    return data.train.tokens.tolist(), data.validation.tokens.tolist()


def test_a_fraction_of_token_blocks_is_the_last_of_them() -> None:
    corpus = Blocks([[1, 2], [3], [4]], [[5]])
    assert tokens_of(prepare(corpus, 10)) == ([1, 2, 3, 4], [5])
    assert tokens_of(prepare(corpus, 10, None, HeldOut(0.5))) == ([1, 2, 3], [4, 5])


def test_the_end_of_one_block_is_held_out() -> None:
    corpus = Blocks([list(range(10))])
    assert tokens_of(prepare(corpus, 10, None, HeldOut(0.2))) == (list(range(8)), [8, 9])


def test_tokens_are_validated_on_tokens(corpus_of: MakeCorpus, texts: dict[str, bytes]) -> None:
    own = HeldOut(corpus=Blocks([[7], [8]], [[9]]))
    assert tokens_of(prepare(Blocks([[1]], [[2]]), 10, None, own)) == ([1, 2], [7, 8, 9])
    with pytest.raises(UserError, match=r"data\.validation holds text, and data\.corpus token ids"):
        prepare(Blocks([[1]]), 10, None, HeldOut(corpus=corpus_of(texts)))
    with pytest.raises(UserError, match="cannot be joined with one of token ids"):
        prepare(corpus_of(texts), VOCAB, None, own)


def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "IN_MEMORY", 10)
    monkeypatch.setattr(documents_module.read_all, "__defaults__", (None, 10))
    monkeypatch.setattr(prepare_module, "IN_MEMORY", 10)
    monkeypatch.setattr(packing, "GROUP", 500)
    monkeypatch.setattr(encoding, "CHARACTERS_AT_ONCE", 500)


def test_a_corpus_that_is_not_kept_in_memory_gives_the_same_data(
    corpus_of: MakeCorpus,
    texts: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts["doc-03"] = " ".join("ab cd\nef" for _ in range(2000)).encode()  # cut into pieces
    kept = prepare(corpus_of(texts), VOCAB)
    before = (tmp_path / "cache" / kept.fingerprint / "seal.json").read_bytes()
    small_memory(monkeypatch)
    for order in (texts, dict(reversed(texts.items()))):
        folder = tmp_path / f"cache of {next(iter(order))}"
        monkeypatch.setenv("MOELOOM_CACHE", str(folder))
        data = prepare(corpus_of(order), VOCAB)
        assert data.fingerprint == kept.fingerprint
        assert (folder / data.fingerprint / "seal.json").read_bytes() == before
        assert np.array_equal(data.train.tokens, kept.train.tokens)


class Changing(Corpus):
    """A corpus that has another document each time it is read."""

    readings = 0

    def documents(self) -> Iterator[Document]:
        self.readings += 1
        for index in range(self.readings):
            yield Document(f"{index}", b"some text", "x")


def test_a_corpus_that_changes_between_readings_is_an_error() -> None:
    documents = read_all(Changing(None), in_memory=1)
    with pytest.raises(UserError, match="has changed while it was read: it had 1 documents"):
        list(documents)


def test_pieces_of_a_text_have_the_ids_of_the_whole() -> None:
    draw = random.Random(0)
    parts = [
        "word ",
        "it's ",
        "3 a",
        "\n",
        "\r\n",
        "  ",
        "x\n\n y",
        "é ",
        "don't\n",
        "!!\n",
        "_a b",
    ]
    text = "".join(draw.choices(parts, k=4000))
    tokenizer = train([text], 300)
    for length in (1, 10, 1000):
        pieces = list(tokenizer.cut(text, length))
        assert "".join(pieces) == text
        assert [i for ids in tokenizer.encode_batch(pieces) for i in ids] == tokenizer.encode(text)
    assert len(list(tokenizer.cut(text, 100))) > 20


def test_another_programs_tokenizer_takes_a_text_whole() -> None:
    tokenizer = train(["ab cd " * 50], 260)
    changed = tokenizer.to_json().replace('"normalizer": null', '"normalizer": {"type": "NFC"}')
    engine = Tokenizer(tokenizers.Tokenizer.from_str(changed))
    assert list(engine.cut("ab cd " * 100, 10)) == ["ab cd " * 100]
