"""The tokenizer: exact size, exact round trip, the same bytes every time."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiers import first_by_default

from core.contracts.errors import UserError
from core.data.tokenizer import LONGEST_PIECE, Tokenizer, has_long_piece, pre_tokenizer, train

PROSE = [
    "The state of the Union is strong, and the Union's people are strong.\n\nIt's 1789!\r\n"
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(PROSE, 280)


def test_the_vocabulary_has_exactly_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == 280
    assert (tokenizer.end, tokenizer.decode([0])) == (0, "<|endoftext|>")
    assert train(PROSE, 257).size == 257


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   three leading spaces, two trailing  ",
        "\tlines\r\nof\rall\n\n\nkinds\r\n\r\n",
        "NUL \x00 and \x1b and \x7f",
        "emoji 👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 is not é; \ufeffBOM, \u200bzero width",
        "ﬁ ligature, ² superscript, Å ångström: nothing is normalised",
        "1234567 and ٣٤٥, 中文字\uff0c日本語、한국어",
        "IT'S they'LL \u017f'\u017f",
        "<|endoftext|>spelt out<|endoftext|>",
        "\U0010ffff\ud7ff\ue000",
    ],
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end not in ids


def test_merges_stay_inside_a_word(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(" Union is the state")]
    assert " Union" in pieces
    assert all(" " not in piece[1:] for piece in pieces)


def test_a_batch_is_encoded_as_its_texts_are(tokenizer: Tokenizer) -> None:
    texts = ["one", "", "two\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_twice_gives_the_same_bytes(texts: dict[str, bytes]) -> None:
    prose = [data.decode() for data in texts.values()]
    assert train(prose, 400).to_json() == train(prose, 400).to_json()


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    text = "The Union's 👍 <|endoftext|>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.to_json() == tokenizer.to_json()


def test_what_other_programs_are_given_begins_with_the_marker_there_and_not_here(
    tokenizer: Tokenizer,
) -> None:
    theirs = tokenizers.Tokenizer.from_str(tokenizer.marked_json())
    text, other = "The Union's 1789", "It's"
    ids, more = tokenizer.encode(text), tokenizer.encode(other)
    assert theirs.encode(text).ids == [0, *ids]
    assert theirs.encode(text, other).ids == [0, *ids, 0, *more]
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert Tokenizer(theirs).encode(text) == ids
    assert tokenizer.to_json() == train(PROSE, 280).to_json(), "what is saved here stays as it was"


def test_entries_report_vocabularies_apart_and_nothing_else(tokenizer: Tokenizer) -> None:
    marked = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.marked_json()))
    assert marked.to_json() != tokenizer.to_json()
    assert marked.entries() == tokenizer.entries()
    assert train(PROSE, 279).entries() != tokenizer.entries()
    more = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    more.add_special_tokens(["<|pad|>"])
    assert Tokenizer(more).entries() != tokenizer.entries()
    parsed = json.loads(tokenizer.to_json())
    parsed["model"]["merges"].reverse()
    assert (
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parsed))).entries()
        != tokenizer.entries()
    )


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.load(path)


def test_a_vocabulary_that_the_text_cannot_fill() -> None:
    with pytest.raises(UserError) as error:
        train(["aaaa"], 1000)
    assert (
        str(error.value)
        == "data.tokenizer.vocab = 1000 is more than the training text can fill: at most 259 entries"
    )
    assert train(["aaaa"], 259).size == 259


def test_a_vocabulary_below_the_bytes() -> None:
    with pytest.raises(UserError) as error:
        train(PROSE, 256)
    assert str(error.value) == (
        "data.tokenizer.vocab = 256 is too small: it must be at least 257 (256 bytes, <|endoftext|>)"
    )


@pytest.mark.parametrize("kind", first_by_default(["letters", "signs", "spaces"]))
def test_a_piece_of_300_kb_is_cut_for_training_and_encoded_whole(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The work of training grows with the square of a piece's length: without a bound each of these took minutes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(3000)]
    alphabet = {"letters": "abcdefgh", "signs": "=-+#", "spaces": " \t"}[kind]
    long = "".join(draw.choices(alphabet, k=300_000))
    texts = [" ".join(words), f"before {long} after"]
    work = []

    def counted(*, bounded: bool = False) -> Any:
        made = pre_tokenizer(bounded=bounded)
        pieces = [piece for text in texts for piece, _ in made.pre_tokenize_str(text)]
        work.append(sum(len(piece) ** 2 for piece in pieces))
        return made

    monkeypatch.setattr("core.data.tokenizer.pre_tokenizer", counted)
    tokenizer = train(texts, 400)
    in_training, afterwards = work
    assert in_training < 301 * LONGEST_PIECE**2
    assert afterwards > 100 * in_training
    ids = tokenizer.encode(long)
    assert tokenizer.decode(ids) == long
    assert tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode(long).ids == ids


def test_a_bound_changes_nothing_for_shorter_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices("abcdefgh", k=k)) for k in range(1, 300, 7))] * 3
    assert not any(map(has_long_piece, texts))
    without = train(texts, 400).to_json()
    monkeypatch.setattr("core.data.tokenizer.has_long_piece", lambda text: True)
    assert train(texts, 400).to_json() == without


@pytest.mark.parametrize("pair", ["\x1c!", "\x1f_", "a\U00010d4a"])
def test_what_python_and_the_library_classify_differently_is_in_a_long_piece(pair: str) -> None:
    """The library takes U+001C to U+001F for signs, and may know a letter of Unicode 16."""
    assert has_long_piece(f"before {pair * LONGEST_PIECE} after")


@pytest.mark.parametrize("letter", ["a", "é", "語", "=", "_", " ", "\n"])
@pytest.mark.parametrize("place", [0, 1, 499, 999, 1000, 1001, 5432])
def test_long_pieces_are_found_wherever_they_are(letter: str, place: int) -> None:
    other = "a1" if letter in "=_" else "=1"
    around = (other * place)[:place]
    assert has_long_piece(around + letter * LONGEST_PIECE + other)
    assert not has_long_piece(around + letter * (LONGEST_PIECE - 1) + "1")
