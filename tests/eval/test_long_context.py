"""`core.long_context`: the loss by preceding tokens against a loop, needles as they are described, errors of a user."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from lab import Lab

import core
from core.context.needle import KEY, needles, score_needles
from core.context.positions import loss_by_position, preceding, ranges
from core.contracts.context import SequenceContext
from core.run.evaluation import evaluate
from core.training.resume import newest_checkpoint


def test_preceding_tokens_are_those_of_the_same_document_in_the_sequence() -> None:
    documents_BM = torch.tensor([[3, 3, 4, 4, 4, 5], [7, 7, 7, 7, 7, 7]])
    assert preceding(documents_BM).tolist() == [[1, 0, 1, 2, 0], [1, 2, 3, 4, 5]]


def test_ranges_hold_every_count_once() -> None:
    for length in (1, 15, 16, 17, 256, 257, 5000):
        found = [count for first, last in ranges(length) for count in range(first, last + 1)]
        assert found == list(range(length + 1))


def test_losses_of_ranges_are_those_of_a_loop_over_the_tokens(lab: Lab) -> None:
    """And a batch may be split in any way."""
    model = core.build(lab.recipe("precision.name=fp64", "model.init.std=0.3")).eval()
    drawn = torch.Generator().manual_seed(1)
    rows_BM = torch.randint(300, (3, 25), generator=drawn)
    documents_BM = torch.tensor([0] * 25 + [0] * 5 + [1] * 20 + [2] * 18 + [3] * 7).view(3, 25)
    valid_BL = torch.arange(24) < torch.tensor([[24], [24], [20]])
    sums: dict[int, list[float]] = defaultdict(lambda: [0, 0.0])
    with torch.no_grad():
        logits_BLV = model.logits(rows_BM[:, :-1])
    assert logits_BLV.dtype == torch.float64
    for b in range(3):
        for place in range(1, 25):
            if not valid_BL[b, place - 1]:
                continue
            before = 0
            while before < place and documents_BM[b, place - before - 1] == documents_BM[b, place]:
                before += 1
            first = 16 if before >= 16 else 0
            logprobs = logits_BLV[b, place - 1].log_softmax(-1)
            sums[first][0] += 1
            sums[first][1] -= float(logprobs[rows_BM[b, place]])
    for split in ([[0, 1, 2]], [[0], [1, 2]], [[2], [1], [0]]):
        read = []
        for chosen in split:
            context = SequenceContext.of(
                rows_BM[chosen, :-1], targets_BL=rows_BM[chosen, 1:], valid_BL=valid_BL[chosen]
            )
            read.append((context, documents_BM[chosen]))
        found = {one.first: one for one in loss_by_position(model, read, 24)}
        assert found.keys() == sums.keys() == {0, 16}
        for first, (tokens, nats) in sums.items():
            assert found[first].tokens == tokens
            assert found[first].nats == pytest.approx(nats, rel=1e-12)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_stands_at_its_depth_in_a_text_of_the_length(depth: float) -> None:
    stream = list(range(100, 400))
    drawn = list(needles(stream, [1, 2], [3], 0, length=80, depth=depth, tries=20, seed=4))
    other = 80 - 2 * (2 + KEY) - 1
    for needle in drawn:
        assert len(needle.tokens) == len(needle.control) == 81
        assert needle.tokens[0] == 0
        assert needle.place == 1 + round(depth * other)
        after = needle.place + 2 + KEY
        key = needle.tokens[-KEY:]
        assert needle.tokens[needle.place : after + 1] == [1, 2, *key, 3]
        assert needle.tokens[-KEY - 2 : -KEY] == [1, 2]
        wrong = needle.control[needle.place + 2 : after]
        assert all(one != other for one, other in zip(wrong, key, strict=True))
        same = [*needle.control[: needle.place + 2], *key, *needle.control[after:]]
        assert same == needle.tokens
        rest = needle.tokens[1 : needle.place] + needle.tokens[after + 1 : -KEY - 2]
        assert rest == list(range(rest[0], rest[0] + other))
    assert len({tuple(needle.tokens[-KEY:]) for needle in drawn}) == 20
    again = needles(stream, [1, 2], [3], 0, length=40, depth=0.2, tries=20, seed=4)
    assert [n.tokens[-KEY:] for n in again] == [n.tokens[-KEY:] for n in drawn]
    with pytest.raises(ValueError, match="no place"):
        list(needles(stream, [1, 2], [3], 0, length=8, depth=depth, tries=1, seed=4))


def test_a_control_has_no_token_of_the_key_in_its_place() -> None:
    """Drawn from two tokens, which an independent draw would often repeat."""
    for needle in needles([7, 8] * 50, [1, 2], [3], 0, length=40, depth=0.0, tries=20, seed=0):
        key, wrong = needle.tokens[-KEY:], needle.control[3 : 3 + KEY]
        assert [one + other for one, other in zip(key, wrong, strict=True)] == [15] * KEY


class _Copies(torch.nn.Module):
    """A model that continues as the text went on after the last token's first occurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(500, 2)

    def hidden(self, context: SequenceContext) -> tuple[torch.Tensor, None]:
        (row,) = context.tokens_BL.tolist()
        follows = [
            row[row.index(token) + 1] if row.index(token) + 1 < len(row) else 0 for token in row
        ]
        return torch.nn.functional.one_hot(torch.tensor([follows]), 500).float(), None

    def output(self, hidden_LD: torch.Tensor) -> torch.Tensor:
        return hidden_LD * 100


def test_a_model_that_copies_finds_every_needle_and_none_that_is_not_there() -> None:
    stream = list(range(100, 400))
    drawn = needles(stream, [1, 2], [3], 0, length=80, depth=0.3, tries=20, seed=4)
    found = score_needles(_Copies(), drawn, 80, 0.3)  # type: ignore[arg-type]
    # A key whose token also stands in the text before the needle is continued as the text does.
    assert found.exact > 8
    assert found.control_exact == 0
    assert found.gain.mean > 100


def test_the_loss_of_the_trained_length_is_that_of_the_evaluation(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    result = lab.command("long_context", finished, "--json", "--lengths", "8,16")
    found = json.loads(result.out)
    validated = evaluate(newest_checkpoint(finished))
    (length,) = [one for one in found["lengths"] if one["length"] == found["trained_length"]]
    assert length["loss"] == pytest.approx(validated["val_loss"], rel=1e-5)
    assert length["bits_per_byte"] == pytest.approx(validated["val_bits_per_byte"], rel=1e-5)
    for one in found["lengths"]:
        total = sum(part["tokens"] for part in one["positions"])
        assert total == one["tokens"] == found["lengths"][0]["tokens"]
        nats = math.fsum(part["tokens"] * part["loss"] for part in one["positions"])
        assert nats == pytest.approx(one["tokens"] * one["loss"], rel=1e-9)


@pytest.mark.full
def test_other_rotary_positions_are_used_and_needles_are_asked_for(
    lab: Lab, finished: Path
) -> None:
    yarn = "model.rope={max_length: 64, yarn: {factor: 4, original_length: 16}}"
    plain = lab.command(
        "long_context", finished, "model.rope.max_length=64", "--lengths", "64", "--json"
    )
    other = lab.command(
        "long_context", finished, yarn, "--lengths", "64", "--json", "--needles", "2"
    )
    (one,), (two,) = (json.loads(result.out)["lengths"] for result in (plain, other))
    assert one["loss"] != two["loss"]
    assert [score["depth"] for score in two["needles"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    shown = lab.command("long_context", finished, yarn, "--lengths", "64", "--needles", "2")
    assert shown.out.count("0/2") >= 5


@pytest.mark.full
def test_the_shortest_length_has_a_needle_and_no_other_text(lab: Lab, finished: Path) -> None:
    ask = ("--json", "--needles", "2", "--lengths")
    refused = lab.command("long_context", finished, *ask, "8")
    assert refused.code == 2
    smallest = int(refused.sentence.rpartition(" ")[2])
    assert refused.sentence.endswith(f"--lengths 8: must be at least {smallest}")
    positions = f"model.rope.max_length={smallest}"
    assert lab.command("long_context", finished, positions, *ask, str(smallest - 1)).code == 2
    assert lab.command("long_context", finished, positions, *ask, str(smallest)).code == 0
    much = lab.command("long_context", finished, "model.rope.max_length=100000", *ask, "99999")
    assert much.code == 2
    assert "with --needles, the tokens of the held-out documents" in much.sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "0"], "--lengths 0: must be whole numbers from 1"),
        (["--lengths", "9" * 5000], "must be whole numbers from 1 to 999999999"),
        (["--lengths", "8,x"], "--lengths 8,x: must be whole numbers from 1"),
        (["--lengths", "99999"], "--lengths 99999: must be at most model.rope.max_length = "),
        (["--needles", "1"], "--needles = 1: must be 0, or at least 2"),
        (["--needles", "-3"], "--needles = -3: must be 0, or at least 2"),
        (["optimizer.lr=1"], "optimizer.lr=1: only keys of model.rope can be changed here"),
        (["model.rope.max_lenght=9"], "max_length"),
        (["--device", "nonsense"], "--device nonsense: is no device"),
    ],
)
def test_mistakes_are_one_sentence_before_the_model_is_loaded(
    lab: Lab, finished: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr("core.context.work.build", None)
    result = lab.command("long_context", finished, *arguments)
    assert result.code == 2
    assert sentence in result.sentence
