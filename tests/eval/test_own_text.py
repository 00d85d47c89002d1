"""`python -m core.evaluate RUN --text FILE`: every token of a user's own text, predicted once."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from lab import Lab

import core
from core.data.tokenizer import Tokenizer
from core.generation.markers import Markers
from core.harness.own_text import pieces, score_text
from core.model.language_model import LanguageModel

from .by_hand import log_likelihood

TEXT = "def first(x):\n    return x + 1  # é, 漢\n" * 3
EXACT = 1e-10


def nats_by_hand(model: LanguageModel, ids: list[int], context: int) -> float:
    """-log p of a text: each token from what its piece holds before it, at most `context` tokens."""
    marked = [0, *ids]
    total = 0.0
    for place in range(1, len(marked)):
        start = (place - 1) // context * context
        if start + context > len(ids):  # the last piece, which begins earlier
            start = max(0, len(ids) - context)
        total -= log_likelihood(model, marked[start : place + 1], 1)
    return total


@pytest.mark.parametrize("context", [1, 5, 24])
def test_bits_per_byte_are_those_of_one_token_after_another(
    model: LanguageModel, tokenizer: Tokenizer, context: int
) -> None:
    found = score_text(model, Markers(), TEXT, tokenizer, context=context, batch_size=3)
    ids = tokenizer.encode(TEXT)
    nats = nats_by_hand(model, ids, context)
    assert (found.tokens, found.bytes) == (len(ids), len(TEXT.encode()))
    assert found.loss == pytest.approx(nats / len(ids), abs=EXACT)
    assert found.perplexity == pytest.approx(math.exp(nats / len(ids)), rel=EXACT)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, abs=EXACT)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 23])
def test_every_token_is_scored_once_from_all_that_fits(length: int) -> None:
    ids = list(range(1, length + 1))
    made = list(pieces(ids, 0, 8))
    scored = [token for piece in made for token in piece.ids[-piece.scored :]]
    assert scored == ids
    assert all(len(piece.ids) - 1 == min(8, length) for piece in made)


@pytest.mark.full
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 23])
def test_the_pieces_are_those_of_the_harness(length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="needs the extra eval")
    ids = list(range(1, length + 1))
    theirs = utils.get_rolling_token_windows(ids, 0, 8, 1)
    disjoint = map(utils.make_disjoint_window, theirs)
    expected = [((*before, *after), len(after)) for before, after in disjoint]
    assert [(piece.ids, piece.scored) for piece in pieces(ids, 0, 8)] == expected


def test_the_command_scores_a_file_of_a_trained_and_of_a_converted_run(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    found = lab.command("evaluate", finished, "--text", file, "--json")
    assert found.code == 0, found.err
    values = json.loads(found.out)
    ids = Tokenizer.load(finished / "tokenizer.json").encode(TEXT.replace("\n", "\r\n"))
    nats = nats_by_hand(core.load(finished), ids, lab.recipe().data.sequence_length)
    assert values["loss"] == pytest.approx(nats / len(ids), rel=1e-5)
    assert values["checkpoint"] == "step-00000012.ckpt"
    pair = "model.blocks.moe.ffn.router.group_score=2"
    lab.fit(tmp_path / "run", pair, "budget.steps=2")
    lab.command("convert", "to-hf", tmp_path / "run", tmp_path / "hf", "--dtype", "fp32")
    lab.command("convert", "from-hf", tmp_path / "hf", tmp_path / "converted")
    both = []
    for run in (tmp_path / "run", tmp_path / "converted"):
        result = lab.command("evaluate", run, "--text", file, "--context", "8", "--json")
        assert result.code == 0, result.err
        both.append(json.loads(result.out)["bits_per_byte"])
    assert both[0] == both[1]


def test_token_ids_need_no_tokenizer(lab: Lab, finished: Path, tmp_path: Path) -> None:
    """As for a converted run whose tokenizer cannot be read."""
    ids = Tokenizer.load(finished / "tokenizer.json").encode(TEXT)
    (tmp_path / "text.txt").write_text(TEXT)
    np.save(tmp_path / "ids.npy", np.array(ids, dtype=np.uint16))
    text = lab.command("evaluate", finished, "--text", tmp_path / "text.txt", "--json")
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "tokenizer.json").unlink()
    tokens = lab.command("evaluate", run, "--text", tmp_path / "ids.npy", "--json")
    assert tokens.code == 0, tokens.err
    found = json.loads(tokens.out)
    assert (found["bytes"], found["bits_per_byte"]) == (None, None)
    assert found["loss"] == json.loads(text.out)["loss"]
    refused = lab.command("evaluate", run, "--text", tmp_path / "text.txt")
    assert refused.code == 2
    assert str(run) in refused.sentence
    assert "tokenizer.json" in refused.sentence


@pytest.mark.parametrize(
    "value", [[[1, 2]], [1.5], [-1], [], [300]], ids=["axes", "reals", "negative", "none", "large"]
)
def test_ids_that_are_none_are_one_sentence(
    lab: Lab, finished: Path, tmp_path: Path, value: list[object]
) -> None:
    np.save(tmp_path / "ids.npy", np.array(value))
    found = lab.command("evaluate", finished, "--text", tmp_path / "ids.npy")
    assert found.code == 2
    assert found.err.count("\n") == 1
    assert found.sentence.startswith(f"--text {tmp_path}/ids.npy: ")


def test_a_file_that_holds_no_ids_is_one_sentence(lab: Lab, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_text("1, 2, 3")
    found = lab.command("evaluate", finished, "--text", tmp_path / "ids.npy")
    assert found.code == 2
    assert found.sentence.startswith(f"--text {tmp_path}/ids.npy: cannot be read as token ids: ")


def test_what_cannot_be_scored_is_one_sentence(lab: Lab, finished: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"\xef\xbb\xbf")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("--text", empty), f"--text {empty}: holds no text"),
        (("--text", binary), f"--text {binary}: cannot be read: it is not UTF-8 text (byte 0xff"),
        (("--text", tmp_path / "no.txt"), f"--text {tmp_path}/no.txt"),
        (("--text", text, "--context", "0"), "--context = 0: must be at least 1"),
        (("--text", text, "--context", "999999"), "--context = 999999: must be at most model"),
        (("--text", text, "--tasks", "a"), "--tasks and --text cannot be combined"),
        (("--text", text, "--limit", "3"), "--limit needs --tasks"),
        (("--text", text, "--xz"), "--xz is for validation and cannot be combined with --text"),
        (("--context", "3"), "--context needs --text"),
    ]
    for arguments, sentence in cases:
        found = lab.command("evaluate", finished, *arguments)
        assert (found.code, found.out) == (2, ""), arguments
        assert found.sentence.startswith(sentence)
