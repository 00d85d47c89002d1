"""Text that comes in parts: whole characters, and nothing that a stop string takes back."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from core.data.tokenizer import Tokenizer, train
from core.generation.text_stream import TextStream

TEXT = "the quick brown fox: naïve café 東京 🦊 ends."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small vocabulary, so that most characters beyond ASCII are several tokens."""
    return train(["the quick brown fox is quick and brown, the fox"] * 3, 259)


def streamed(
    tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = ()
) -> tuple[list[str], TextStream]:
    """The pieces of the text of some tokens."""
    stream = TextStream(tokenizer.decode, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


def test_the_pieces_are_the_text_and_each_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT), "some characters span several tokens"
    pieces, stream = streamed(tokenizer, ids)
    assert "".join(pieces) == stream.text == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces[0] != ""
    assert sum(piece != "" for piece in pieces) > len(TEXT) / 3, "text comes as early as it can"


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_have_the_text_of_all_of_them(tokenizer: Tokenizer, seed: int) -> None:
    """Random tokens are mostly bytes that are no UTF-8."""
    draw = random.Random(seed)
    ids = [draw.randrange(tokenizer.size) for _ in range(60)]
    pieces, stream = streamed(tokenizer, ids)
    assert "".join(pieces) == stream.text == tokenizer.decode(ids)


def slow_cut(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize(
    "stops",
    [
        ["fox"],
        ["fox: naïve c"],  # over several tokens
        ["k b", "quick brown fox"],  # the shorter one is complete first
        ["fox", "brown fox"],  # both end at the same place
        ["ïve", "é"],  # a part of a token's text
        ["東京"],
        ["🦊"],
        ["zebra", "brown fax", "foxes", "ends.."],  # beginnings only
        ["t"],
        ["the the", "ends."],
    ],
    ids=str,
)
def test_a_text_ends_before_the_stop_string_that_is_complete_first(
    tokenizer: Tokenizer, stops: list[str]
) -> None:
    pieces, stream = streamed(tokenizer, tokenizer.encode(TEXT), stops)
    expected = slow_cut(TEXT, stops)
    assert stream.text == expected
    assert "".join(pieces) == expected
    assert stream.stopped == (expected != TEXT)


def test_random_stops_cut_where_a_loop_cuts(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    stopped = 0
    for _ in range(300):
        text = "".join(draw.choices("abé", k=draw.randint(1, 30)))
        stops = ["".join(draw.choices("abé", k=draw.randint(1, 6))) for _ in range(3)]
        pieces, stream = streamed(tokenizer, tokenizer.encode(text), stops)
        assert "".join(pieces) == stream.text == slow_cut(text, stops), (text, stops)
        stopped += stream.stopped
    assert 50 < stopped < 290


def test_a_tokenizer_that_writes_spaces_before_words_is_streamed_too(tmp_path: Path) -> None:
    """As Llama's: the first word of a text has no space, a later one has; a piece by itself does not tell."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    words = {"▁the": 0, "▁fox": 1, "es": 2, "<|endoftext|>": 3}
    engine = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    own = Tokenizer(engine)
    assert own.decode([0, 1]) == "the fox"
    pieces, stream = streamed(own, [0, 1, 2, 0])
    assert stream.text == own.decode([0, 1, 2, 0])
    assert pieces[:2] == ["the", " fox"]
