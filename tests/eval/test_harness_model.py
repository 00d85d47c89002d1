"""Our model as the harness sees it: which tokens are scored, what is cut, where text begins and ends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.contracts.errors import UserError
from core.data.tokenizer import Tokenizer
from core.generation.markers import Markers, markers_of
from core.generation.run_tokenizer import RunTokenizer
from core.model.language_model import LanguageModel
from core.training.run_folder import RunFolder

from .by_hand import greedy, log_likelihood
from .conftest import LONGEST

pytest.importorskip("lm_eval", reason="needs the extra eval")
from core.harness.model import HarnessModel

EXACT = 1e-10


@dataclass
class HarnessRequest:
    """A request of the harness, with the only attribute that models read."""

    args: tuple[Any, ...]


def wrapped(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    markers: Markers = Markers(),  # noqa: B008 - frozen
    batch_size: int = 4,
    messages: list[str] | None = None,
) -> Any:
    """The model for the harness; its messages are appended to a list."""
    return HarnessModel(
        model,
        RunTokenizer(tokenizer, markers),
        batch_size=batch_size,
        say=([] if messages is None else messages).append,
    )


@pytest.fixture
def ours(model: LanguageModel, tokenizer: Tokenizer) -> Any:
    """The model for the harness, with batches of four."""
    return wrapped(model, tokenizer)


def scored(ours: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return ours.loglikelihood([HarnessRequest(pair) for pair in pairs], disable_tqdm=True)


def test_a_text_begins_with_the_marker_and_only_the_continuation_counts(
    ours: Any, model: LanguageModel, tokenizer: Tokenizer
) -> None:
    pairs = [("abc de", " fgh"), ("abc de", " k"), ("l", " abc abc")]
    for (context, continuation), (value, _) in zip(pairs, scored(ours, *pairs), strict=True):
        whole = [0, *tokenizer.encode(context + continuation)]
        count = len(whole) - 1 - len(tokenizer.encode(context))
        assert count > 0
        assert value == pytest.approx(log_likelihood(model, whole, count), abs=EXACT)


def test_without_a_context_the_marker_is_all_that_precedes(
    ours: Any, model: LanguageModel, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("abc de")
    ((value, _), nothing) = scored(ours, ("", "abc de"), ("", ""))
    assert value == pytest.approx(log_likelihood(model, [0, *ids], len(ids)), abs=EXACT)
    assert nothing == (0.0, True)


def test_spaces_before_the_cut_belong_to_the_continuation(ours: Any) -> None:
    (before, after) = scored(ours, ("abc  ", "de"), ("abc", "  de"))
    assert before == after


def test_a_continuation_that_merges_into_the_context_is_encoded_by_itself(
    ours: Any, model: LanguageModel, tokenizer: Tokenizer
) -> None:
    letters = "abcdefghijkl"
    merged = [(a, b) for a in letters for b in letters if len(tokenizer.encode(a + b)) == 1]
    assert merged, "a vocabulary of 300 has pairs of letters"
    (a, b) = merged[0]
    ((value, _),) = scored(ours, (a, b))
    ids = [0, *tokenizer.encode(a), *tokenizer.encode(b)]
    assert value == pytest.approx(log_likelihood(model, ids, 1), abs=EXACT)


def test_a_spelt_out_marker_is_text(ours: Any) -> None:
    ids = ours.tok_encode("a<|endoftext|>")
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert ours.tok_encode("a", add_special_tokens=False) == ids[1:2]


def test_what_does_not_fit_is_cut_from_the_left_and_reported(
    model: LanguageModel, tokenizer: Tokenizer
) -> None:
    messages: list[str] = []
    ours = wrapped(model, tokenizer, messages=messages)
    long = " ".join(["xyz"] * 12)
    whole = [0, *tokenizer.encode(long + " a")]
    assert len(whole) > LONGEST + 1
    ((value, _), _) = scored(ours, (long, " a"), ("b", " a"))
    count = len(whole) - 1 - len(tokenizer.encode(long))
    assert value == pytest.approx(log_likelihood(model, whole[-(LONGEST + 1) :], count), abs=EXACT)
    assert messages == [
        f"note: 1 of 2 texts lost their beginning: the model reads {LONGEST} tokens"
    ]


def test_a_text_that_just_fits_keeps_its_beginning(
    model: LanguageModel, tokenizer: Tokenizer
) -> None:
    """The last token is predicted and never read, so one more than the model reads."""
    messages: list[str] = []
    ours = wrapped(model, tokenizer, messages=messages)
    context = "?" * (LONGEST - len(tokenizer.encode(" zz")))
    whole = [0, *tokenizer.encode(context + " zz")]
    assert len(whole) == LONGEST + 1
    ((value, _),) = scored(ours, (context, " zz"))
    count = len(tokenizer.encode(" zz"))
    assert value == pytest.approx(log_likelihood(model, whole, count), abs=EXACT)
    assert messages == []


def test_an_answer_longer_than_what_the_model_reads_is_refused(ours: Any) -> None:
    limit = rf"longer than the model's longest input: model\.rope\.max_length = {LONGEST}"
    with pytest.raises(UserError, match=limit):
        scored(ours, ("a", " " + "?" * 60))


def test_batches_and_their_order_change_nothing(model: LanguageModel, tokenizer: Tokenizer) -> None:
    pairs = [("abc " * k, " de" * n) for k in (1, 3, 5) for n in (1, 2, 3)]
    one = scored(wrapped(model, tokenizer, batch_size=1), *pairs)
    many = scored(wrapped(model, tokenizer, batch_size=9), *pairs[::-1])[::-1]
    assert [value for value, _ in one] == pytest.approx([value for value, _ in many], abs=EXACT)
    assert [flag for _, flag in one] == [flag for _, flag in many]


@pytest.mark.parametrize(
    "count", [0, 1, LONGEST - 1, LONGEST, LONGEST + 1, 2 * LONGEST, 2 * LONGEST + 7]
)
def test_a_rolling_score_predicts_every_token_once(
    ours: Any, model: LanguageModel, tokenizer: Tokenizer, count: int
) -> None:
    """Windows of what the model reads, one after another; the last one has as much before it as fits."""
    text = "".join("?!;:"[k % 3] for k in range(count))
    ids = tokenizer.encode(text)
    assert len(ids) == count
    expected = log_likelihood(model, [0, *ids[:LONGEST]], min(count, LONGEST)) if count else 0.0
    done = LONGEST
    while done < count:
        stop = min(done + LONGEST, count)
        expected += log_likelihood(model, ids[stop - LONGEST - 1 : stop], stop - done)
        done = stop
    (value,) = ours.loglikelihood_rolling([HarnessRequest((text,))], disable_tqdm=True)
    assert value == pytest.approx(expected, abs=EXACT)


def test_rolling_scores_come_back_in_order(ours: Any) -> None:
    texts = ["abc " * 20, "", "de", "?" * 30]
    alone = [
        ours.loglikelihood_rolling([HarnessRequest((text,))], disable_tqdm=True)[0]
        for text in texts
    ]
    together = ours.loglikelihood_rolling(
        [HarnessRequest((text,)) for text in texts], disable_tqdm=True
    )
    assert together == pytest.approx(alone, abs=EXACT)
    assert together[1] == 0.0


def written(ours: Any, *requests: tuple[str, dict[str, Any]]) -> list[str]:
    return ours.generate_until([HarnessRequest(one) for one in requests], disable_tqdm=True)


def test_what_is_written_is_greedy_and_as_long_as_asked(
    ours: Any, model: LanguageModel, tokenizer: Tokenizer
) -> None:
    prompts = ["abc", "abc de", "b", "", "def"]
    texts = written(ours, *((prompt, {"until": [], "max_gen_toks": 6}) for prompt in prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = greedy(model, [0, *tokenizer.encode(prompt)], 6)
        ids = ids[: ids.index(0)] if 0 in ids else ids
        assert text == tokenizer.decode(ids)


def test_the_end_marker_ends_a_text(ours: Any, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """The third token that the model writes is made to be the marker."""
    (text,) = written(ours, ("abc", {"max_gen_toks": 8}))
    third = greedy(model, [0, *tokenizer.encode("abc")], 3)
    assert third[2] not in third[:2]
    assert text.startswith(tokenizer.decode(third[:2]))
    other = wrapped(model, tokenizer, markers=Markers(begin=0, end=third[2]))
    assert written(other, ("abc", {"max_gen_toks": 8})) == [tokenizer.decode(third[:2])]


def test_the_begin_marker_stands_before_every_text(
    model: LanguageModel, tokenizer: Tokenizer
) -> None:
    """Released models have two markers."""
    other = wrapped(model, tokenizer, markers=Markers(begin=7, end=0))
    ids = tokenizer.encode("abc de")
    values = [value for value, _ in scored(other, ("abc", " de"), ("", "abc de"))]
    values += other.loglikelihood_rolling([HarnessRequest(("abc de",))], disable_tqdm=True)
    count = len(ids) - len(tokenizer.encode("abc"))
    expected = [
        log_likelihood(model, [7, *ids], scored_) for scored_ in (count, len(ids), len(ids))
    ]
    assert values == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize(
    ("converted", "markers"),
    [
        (None, Markers(0, 0)),
        ({"begin": 0, "end": 1}, Markers(0, 1)),
        ({"begin": None, "end": 5}, Markers(5, 5)),
        ({"begin": 4, "end": None}, Markers(4, 4)),
    ],
)
def test_a_converted_run_has_its_sources_markers(
    tmp_path: Path, converted: dict[str, int | None] | None, markers: Markers
) -> None:
    run = RunFolder(tmp_path)
    assert markers_of(run) == Markers(0, 0)
    run.write_json("provenance.json", {} if converted is None else {"converted": converted})
    assert markers_of(run) == markers


def test_a_converted_run_without_any_marker_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_json("provenance.json", {"converted": {"begin": None, "end": None}})
    with pytest.raises(UserError, match="no marker begins a text"):
        markers_of(run)


def test_a_text_is_cut_before_its_first_stop(ours: Any) -> None:
    (whole,) = written(ours, ("abc", {"max_gen_toks": 12}))
    assert len(whole) > 6
    late, early = whole[5:7], whole[2:4]
    assert written(ours, ("abc", {"until": [late, early, ""], "max_gen_toks": 12})) == [
        whole[: whole.index(early)]
    ]
    assert written(ours, ("abc", {"until": early, "max_gen_toks": 12})) == [
        whole[: whole.index(early)]
    ]


def test_of_two_stops_in_one_token_the_earlier_cuts(ours: Any) -> None:
    (whole,) = written(ours, ("abc", {"max_gen_toks": 12}))
    place = next(k for k in range(1, len(whole)) if whole.index(whole[k]) == k)
    late, early = whole[place], whole[place - 1 : place + 1]
    assert written(ours, ("abc", {"until": [late, early], "max_gen_toks": 12})) == [
        whole[: place - 1]
    ]


def test_answers_in_batches_are_those_alone(model: LanguageModel, tokenizer: Tokenizer) -> None:
    prompts = ["abc", "def", "abd", "b", "c", "abc de"]
    requests = [(prompt, {"until": ["a"], "max_gen_toks": 7}) for prompt in prompts]
    together = written(wrapped(model, tokenizer, batch_size=6), *requests)
    assert together == [
        written(wrapped(model, tokenizer, batch_size=1), one)[0] for one in requests
    ]


def test_a_long_prompt_leaves_package_for_the_answer(
    ours: Any, model: LanguageModel, tokenizer: Tokenizer
) -> None:
    prompt = "?!;:" * 20
    (text,) = written(ours, (prompt, {"max_gen_toks": 10}))
    ids = greedy(model, tokenizer.encode(prompt)[-(LONGEST - 10) :], 10)
    assert text == tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)


def test_samples_are_fixed_by_their_place_and_stop_too(ours: Any) -> None:
    settings = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 12}
    first = written(ours, ("abc", settings), ("abc", settings))
    assert first == written(ours, ("abc", settings), ("abc", settings))
    assert first[0] != first[1]
    stop = first[0][4:6]
    assert written(ours, ("abc", {**settings, "until": [stop]})) == [
        first[0][: first[0].index(stop)]
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beams": 4}, "unknown generation settings num_beams; known: "),
        (
            {"max_gen_toks": LONGEST},
            f"max_gen_toks = {LONGEST} leaves no tokens for question or answer",
        ),
        ({"max_gen_toks": 0}, "max_gen_toks = 0 leaves no tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    ours: Any, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        written(ours, ("a", settings))
