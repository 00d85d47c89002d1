"""Tokenizers from files: their ids, their markers, and every mistake in one sentence."""

import itertools
import json
import re
from pathlib import Path

import pytest
from conftest import MakeCorpus
from tokenizer_files import (
    ASSISTANT,
    BEGIN,
    END,
    TEXT,
    THINK,
    TIKTOKEN_PATTERN,
    USER,
    write_deepseek_like,
    write_tiktoken,
)

from core.contracts.errors import ConfigError, UserError
from core.data.prepare import prepare
from core.data.tokenizer import Tokenizer, train
from core.data.tokenizer_file import load_tokenizer_file
from core.recipe.tokenizer_file import TokenizerFile

ODD = f"it's 12345 \n\n  {USER} naïve 漢字 {THINK}x{END} \t{BEGIN}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek_like(tmp_path_factory.mktemp("hf"))


def test_text_that_looks_like_a_marker_is_text_and_comes_back(folder: Path) -> None:
    tokenizer = load_tokenizer_file(folder)
    added = {tokenizer.id_of(one) for one in (BEGIN, END, USER, ASSISTANT, THINK)}
    assert None not in added
    ids = tokenizer.encode(ODD)
    assert not added.intersection(ids)
    assert tokenizer.decode(ids) == ODD


def test_markers_that_are_asked_for_are_single_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer_file(folder)
    ids = tokenizer.encode_marked(ODD)
    found = [token for token in ids if tokenizer.text_of(token) in (BEGIN, END, USER, THINK)]
    assert [tokenizer.text_of(token) for token in found] == [USER, THINK, END, BEGIN]
    assert tokenizer.decode(ids) == ODD
    assert tokenizer.encode(ODD) != ids, "asking for markers once must not change later texts"


def test_runs_of_spaces_among_the_added_entries_stay_tokens(tmp_path: Path) -> None:
    write_deepseek_like(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    new = {**content["added_tokens"][-1], "id": 303, "content": "    "}
    content["added_tokens"].append(new)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert 303 in load_tokenizer_file(tmp_path).encode("a    b")


@pytest.mark.parametrize("which", ["folder", "file"])
def test_markers_and_size_come_from_the_files(folder: Path, which: str) -> None:
    path = folder if which == "folder" else folder / "tokenizer.json"
    found = TokenizerFile.read(path)
    assert found.markers(None, None) == (BEGIN, END)
    assert found.size() == 303
    tokenizer = load_tokenizer_file(path)
    assert (tokenizer.begin, tokenizer.end, tokenizer.ending) == (0, 1, 1)


def test_markers_without_settings_are_known_by_their_names(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "any.json"
    alone.write_text((folder / "tokenizer.json").read_text())
    assert TokenizerFile.read(alone).markers(None, None) == (BEGIN, END)
    assert TokenizerFile.read(alone).markers(None, USER) == (BEGIN, USER)


def test_markers_by_number_come_from_the_generation_settings(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    ids = {"bos_token_id": None, "eos_token_id": [301, 1]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ids))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert TokenizerFile.read(tmp_path).markers(None, None) == (ASSISTANT, ASSISTANT)


def test_a_trained_tokenizer_is_read_with_its_one_marker(tmp_path: Path) -> None:
    train([TEXT], 280).save(tmp_path / "tokenizer.json")
    found = load_tokenizer_file(tmp_path)
    assert (found.begin, found.end, found.ending) == (0, 0, None)


def test_documents_are_surrounded_by_the_markers(
    folder: Path, corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    tokenizer = load_tokenizer_file(folder)
    texts["doc-03"] = f"spelt out: {END}".encode()
    data = prepare(corpus_of(texts), 320, given=tokenizer)
    stream = data.train.tokens.tolist()
    first = [tokenizer.begin, *tokenizer.encode(texts["doc-00"].decode()), tokenizer.end]
    assert stream[: len(first)] == first
    assert data.train.starts[1] == len(first)
    assert stream.count(tokenizer.begin) == stream.count(tokenizer.end) == 24
    assert stream[-1] == tokenizer.end
    assert data.train.bytes == sum(len(texts[name]) for name in texts if name != "doc-10")


def test_the_fingerprint_holds_the_tokenizer_and_its_markers(
    folder: Path, corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    corpus = corpus_of(texts)
    tokenizer = load_tokenizer_file(folder)
    other = load_tokenizer_file(folder, end=USER)
    found = [prepare(corpus, 303, given=one).fingerprint for one in (tokenizer, other, None)]
    assert len(set(found)) == 3
    again = load_tokenizer_file(folder / "tokenizer.json")
    assert prepare(corpus, 303, given=again).fingerprint == found[0]


def reference_bpe(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: a whole entry, else the neighbours are joined whose entry has the smallest number."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        joined = [(ranks.get(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        known = [pair for pair in joined if pair[0] is not None]
        if not known:
            return [ranks[part] for part in parts]
        _, place = min(known)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_a_tiktoken_file_has_the_ids_of_its_rule(tmp_path: Path) -> None:
    file = tmp_path / "some.tiktoken"
    ranks = write_tiktoken(file)
    tokenizer = load_tokenizer_file(file, pattern=r"\w+|\W+", end="<|endoftext|>")
    for text in (TEXT, "word1 the tale", "ünïcode 漢字 <|endoftext|>"):
        expected = [
            token
            for piece in re.findall(r"\w+|\W+", text)
            for token in reference_bpe(piece.encode(), ranks)
        ]
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text
    assert tokenizer.begin == tokenizer.end == len(ranks)
    assert tokenizer.encode_marked("<|endoftext|>") == [len(ranks)]


def test_a_tiktoken_file_takes_its_markers_from_the_settings_beside_it(tmp_path: Path) -> None:
    ranks = write_tiktoken(tmp_path / "tiktoken.model")
    first = len(ranks)
    added = {str(first + 1): {"content": "[BOS]"}, str(first + 4): {"content": "[EOS]"}}
    settings = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer_file(tmp_path / "tiktoken.model", pattern=TIKTOKEN_PATTERN)
    assert (tokenizer.begin, tokenizer.end) == (first + 1, first + 4)
    assert TokenizerFile.read(tmp_path / "tiktoken.model", TIKTOKEN_PATTERN).size() == first + 5
    assert tokenizer.last == first + 4
    again = tmp_path / "again.json"
    tokenizer.save(again)
    assert Tokenizer.load(again).encode(TEXT) == tokenizer.encode(TEXT)
    assert Tokenizer.load(again).id_of("[EOS]") == first + 4


def mistake(path: Path, **keys: str) -> tuple[str, str]:
    with pytest.raises(ConfigError) as found:
        load_tokenizer_file(path, **keys)
    return found.value.key, found.value.why


def test_mistakes_name_the_key_and_what_is_allowed(folder: Path, tmp_path: Path) -> None:
    assert mistake(tmp_path / "missing.json") == ("file", "there is no such file")
    key, why = mistake(tmp_path)
    assert key == "file"
    assert why.startswith("this folder holds no tokenizer.json; it must be")
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    assert "transformers writes one" in mistake(tmp_path)[1]
    (tmp_path / "config.json").write_text("{}")
    assert "it has no section `model`" in mistake(tmp_path / "config.json")[1]
    (tmp_path / "bad.json").write_text("{")
    assert "cannot be read as JSON" in mistake(tmp_path / "bad.json")[1]
    (tmp_path / "broken.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    assert mistake(tmp_path / "broken.json", end="a")[0] == "file"
    (tmp_path / "words.txt").write_text("two words here\n")
    assert "line 1 of" in mistake(tmp_path / "words.txt", pattern=".")[1]
    write_tiktoken(tmp_path / "some.tiktoken")
    assert mistake(tmp_path / "some.tiktoken")[0] == "pattern"
    assert mistake(tmp_path / "some.tiktoken", pattern=".")[0] == "end"
    assert mistake(tmp_path / "some.tiktoken", pattern="(", end="e")[0] == "pattern"
    assert mistake(folder, pattern=".")[0] == "pattern"
    key, why = mistake(folder, end="<|User|>")
    assert (key, f"did you mean {USER}" in why) == ("end", True)


def test_a_corpus_of_tokens_with_a_tokenizer_of_its_own_takes_no_other(folder: Path) -> None:
    from core.data.prepare import _with_given
    from core.data.prepared import Prepared

    data = Prepared(
        tokenizer=train([TEXT], 280), train=None, validation=None, fingerprint="", dropped=0
    )  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data\.tokenizer\.file: must be null"):
        _with_given(data, load_tokenizer_file(folder))
