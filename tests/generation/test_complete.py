"""`core.complete`: one completion for each prompt, why it ended, and what it took."""

from pathlib import Path
from typing import Any

import pytest
import torch

import core
from core.contracts.errors import UserError
from core.generation.completion import Completer, Completions
from core.generation.options import GenerationOptions
from core.generation.run_tokenizer import RunTokenizer
from core.generation.writer import Prompt
from core.model.attend import TensorCache
from core.model.language_model import LanguageModel

from .slow import PROMPTS, assert_greedy, model_with

TEXTS = ["abc", "", "a longer prompt of letters", "de"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return model_with(1)


@pytest.fixture
def trained(finished: Path) -> tuple[LanguageModel, RunTokenizer]:
    """The small run and its tokenizer."""
    return core.load(finished), core.load_tokenizer(finished)


def test_token_ids_are_continued_side_by_side_as_each_by_itself(model: LanguageModel) -> None:
    found = core.complete(model, PROMPTS, tokens=6, batch=4)
    for one, prompt in zip(found, PROMPTS, strict=True):
        assert len(one.tokens) == 6
        assert_greedy(model, prompt, one.tokens)
    again = core.complete(model, PROMPTS, tokens=6, batch=3)
    assert [one.tokens for one in again] == [one.tokens for one in found]
    assert [one.prompt for one in found] == PROMPTS
    assert {(one.text, one.ended) for one in found} == {(None, "length")}
    speed = found.speed
    assert speed.prompt_tokens == sum(map(len, PROMPTS))
    assert (speed.tokens, speed.passes) == (4 * 5, 5)
    assert speed.prefill_seconds > 0
    assert speed.decode_seconds > 0
    assert found.tokens_per_pass is None


def test_rows_end_one_by_one_and_change_nothing_for_the_others(model: LanguageModel) -> None:
    """The end token of each row is the one that it writes second, third, ..."""
    whole = [one.tokens for one in core.complete(model, PROMPTS, tokens=8)]
    end = whole[0][3]
    assert 0 < sum(end in text for text in whole) < 4
    for drafts in (0, 2):
        found = core.complete(model, PROMPTS, tokens=8, end=end, drafts=drafts)
        for one, text in zip(found, whole, strict=True):
            ends = end in text
            assert one.tokens == (text[: text.index(end)] if ends else text)
            assert one.ended == ("end" if ends else "length")


def test_texts_have_the_marker_and_end_at_a_stop_string(
    trained: tuple[LanguageModel, RunTokenizer],
) -> None:
    model, tokenizer = trained
    plain = core.complete(model, TEXTS, tokenizer=tokenizer, tokens=12, end=-1)
    for one, text in zip(plain, TEXTS, strict=True):
        assert one.prompt == [0, *tokenizer.tokenizer.encode(text)]
        assert_greedy(model, one.prompt, one.tokens)
        assert one.text == tokenizer.decode(one.tokens)
    assert plain[0].text is not None
    stop = plain[0].text[3:6]
    for drafts in (0, 1):
        found = core.complete(
            model, TEXTS, tokenizer=tokenizer, tokens=12, end=-1, stop=[stop], drafts=drafts
        )
        for one, before in zip(found, plain, strict=True):
            assert before.text is not None
            assert one.text == before.text.partition(stop)[0]
            assert one.ended == ("stop" if stop in before.text else "length")
            assert before.tokens[: len(one.tokens)] == one.tokens
    assert found[0].ended == "stop"


def test_pieces_of_all_texts_come_as_they_are_written(
    trained: tuple[LanguageModel, RunTokenizer],
) -> None:
    model, tokenizer = trained
    pieces: list[tuple[int, str]] = []
    found = core.complete(
        model, TEXTS, tokenizer=tokenizer, tokens=8, on_text=lambda *piece: pieces.append(piece)
    )
    for number, one in enumerate(found):
        assert "".join(text for of, text in pieces if of == number) == one.text
    assert all(text for _, text in pieces)
    assert len(pieces) > 2 * len(TEXTS), "not only at the end"
    assert [of for of, _ in pieces] != sorted(of for of, _ in pieces), "side by side"


def test_the_numbers_of_a_call_are_the_sums_of_its_rows(model: LanguageModel) -> None:
    found = core.complete(model, PROMPTS, tokens=9, drafts=3, batch=3)
    for name in ("drafted", "accepted"):
        rows = [getattr(one, name) for one in found]
        assert getattr(found, name) == [
            sum(row[place] for row in rows if len(row) > place) for place in range(3)
        ]
    tokens = sum(len(one.tokens) - 1 for one in found)
    passes = sum(one.drafted[0] for one in found)
    single = (
        tokens - passes - sum(found.accepted)
    )  # passes at the end of a row, which need no draft
    assert 0 <= single <= len(PROMPTS)
    assert found.tokens_per_pass == 1 + sum(found.accepted) / passes
    assert isinstance(found, Completions)


def test_nothing_is_continued_without_prompts(model: LanguageModel) -> None:
    assert list(core.complete(model, [])) == []


@pytest.mark.parametrize(
    ("prompts", "rest", "sentence"),
    [
        ("abc", {}, "prompts: must be a list of texts, or of lists of token ids"),
        (["abc"], {}, "prompt 0 is text: give the tokenizer of the run too"),
        ([[1], []], {}, "prompt 1 has no token: give at least the token that begins a text"),
        ([[1], [2, 0.5]], {}, "prompt 1 must be a text or a list of token ids, not [2, 0.5]"),
        ([[1], None], {}, "prompt 1 must be a text or a list of token ids, not None"),
        ([b"a"], {}, "prompt 0 must be a text or a list of token ids, not b'a'"),
        ([1, 2], {}, "prompt 0 must be a text or a list of token ids, not 1"),
        ([["a"]], {}, "prompt 0 must be a text or a list of token ids, not ['a']"),
        ([[1]], {"stop": ["a"]}, "stop strings and pieces of text need a tokenizer"),
        ([[1]], {"stop": "ab"}, "stop = 'ab': must be a list of strings"),
        ([[1]], {"top_k": 0}, "top_k = 0: must be at least 1"),
        ([[1], [300]], {}, "prompt 1 has the token 300, which is not in a vocabulary of 300"),
        (
            [[1], [1] * 4000],
            {"tokens": 200},
            "prompt 1 of 4000 tokens, tokens 200: together at most 4097, because the model reads "
            "model.rope.max_length = 4096",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    model: LanguageModel, prompts: Any, rest: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        core.complete(model, prompts, **rest)
    assert str(error.value) == sentence


def test_prompts_may_be_tensors(model: LanguageModel) -> None:
    listed = core.complete(model, [[1, 2, 3], [4, 5, 6]], tokens=3)
    tensors = core.complete(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), tokens=3)  # type: ignore[arg-type]
    assert [one.tokens for one in tensors] == [one.tokens for one in listed]


def test_a_model_in_training_is_refused() -> None:
    model = model_with(1).train()
    with pytest.raises(
        UserError, match=r"the model is in training mode: call model\.eval\(\) first"
    ):
        core.complete(model, [[1]])


def test_gradients_are_not_kept(model: LanguageModel) -> None:
    with torch.enable_grad():
        core.complete(model, PROMPTS, tokens=3, drafts=1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_folder_without_a_run_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        core.load_tokenizer(tmp_path)


def test_single_prompts_come_in_their_order_though_lengths_may_not_be_mixed(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches that cannot be truncated take only rows of one length together; `--stream` prints one after the other."""
    monkeypatch.setattr(TensorCache, "truncates", False)
    prompts = [Prompt(tokens, 2, number) for number, tokens in enumerate([[5], [7, 9], [3]])]

    def batches(rows: int) -> list[list[int]]:
        completer = Completer(model, GenerationOptions(batch=rows), None, None)
        return list(completer._batches(prompts))

    assert batches(1) == [[0], [1], [2]]
    assert batches(2) == [[0, 2], [1]]
