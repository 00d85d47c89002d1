"""Drafts change how fast a text comes, and nothing else; drafting is the multi-token module's own forward."""

from collections.abc import Sequence

import pytest
import torch
from model import tiny
from tiers import first_by_default
from torch import Tensor

import core.generation.speculation
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.generation.completion import Completer, complete
from core.generation.drafting import Drafter
from core.generation.options import GenerationOptions
from core.generation.writer import Prompt, Writer
from core.model.language_model import LanguageModel

from .slow import PROMPTS, assert_greedy, distribution, greedy, model_with, next_logits

CASES = [(2, 3), (1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (3, 5)]
"""Depths of the model, and drafts in a pass."""


# ---- greedy text


@pytest.mark.parametrize("case", first_by_default(CASES))
def test_greedy_text_with_drafts_is_the_text_of_the_full_forward(case: tuple[int, int]) -> None:
    """Rows of different lengths, which accept different numbers of drafts."""
    depth, drafts = case
    model = model_with(depth)
    found = complete(model, PROMPTS, tokens=12, drafts=drafts)
    for one, prompt in zip(found, PROMPTS, strict=True):
        assert len(one.tokens) == 12
        assert_greedy(model, prompt, one.tokens)
    assert 0 < sum(found.accepted) < sum(found.drafted)
    assert len(found.accepted) == drafts
    assert found.accepted == sorted(found.accepted, reverse=True)


@pytest.mark.full
@pytest.mark.parametrize("attention", [*tiny.ATTENTIONS.values(), tiny.SPARSE])
def test_every_attention_drafts_and_forgets(attention: tuple[str, ...]) -> None:
    model = model_with(1, *attention)
    found = complete(model, PROMPTS, tokens=12, drafts=2)
    assert [one.tokens for one in found] == [greedy(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.full
def test_in_fp32_texts_part_where_two_tokens_are_nearly_equal_or_nowhere() -> None:
    """A pass of several tokens rounds otherwise than one of a single token."""
    model = model_with(1, *tiny.FP32)
    plain = complete(model, PROMPTS, tokens=24)
    drafted = complete(model, PROMPTS, tokens=24, drafts=2)
    for one, other, prompt in zip(plain, drafted, PROMPTS, strict=True):
        places = zip(one.tokens, other.tokens, strict=True)
        parts = [place for place, (first, second) in enumerate(places) if first != second]
        if parts:
            best = next_logits(model, [*prompt, *one.tokens[: parts[0]]]).topk(2).values
            assert float(best[0] - best[1]) < 1e-4


@pytest.mark.full
def test_the_counts_are_those_of_the_text() -> None:
    """By hand, for one row: the next tokens are compared with what the module would draft."""
    assert_counts_are_those_of_the_text(model_with(1))


def assert_counts_are_those_of_the_text(model: LanguageModel) -> None:
    """Drafts, one in a pass, are what the module's training forward predicts."""
    (found,) = complete(model, [PROMPTS[2]], tokens=12, drafts=1)
    written = greedy(model, PROMPTS[2], 12)
    place = 1  # the first token comes from the prompt
    drafted = accepted = 0
    while place < 11:  # the last token is never drafted
        text = [*PROMPTS[2], *written[:place]]
        draft = int(slow_draft_logits(model, text, 1)[0].argmax())
        drafted += 1
        accepted += draft == written[place]
        place += 1 + (draft == written[place])
    assert found.drafted == [drafted]
    assert found.accepted == [accepted]


def test_a_text_that_fills_the_model_is_drafted_to_its_end() -> None:
    """The longest row leaves no position for drafts while the others still have many."""
    model = model_with(1, "model.rope.max_length=16")
    found = complete(model, PROMPTS, drafts=4)
    assert [len(one.tokens) for one in found] == [14, 16, 8, 15]
    for one, prompt in zip(found, PROMPTS, strict=True):
        assert_greedy(model, prompt, one.tokens)


# ---- the module's own forward


def slow_draft_logits(model: LanguageModel, text: Sequence[int], depth: int) -> Tensor:
    """The logits 1 x V of a depth for the token after a text, from the training forward of the head."""
    tokens_BM = torch.tensor([[*text, 0]])
    context = SequenceContext.of(tokens_BM[:, :-1], targets_BL=tokens_BM[:, 1:])
    states = []
    module = model.get_submodule(f"heads.mtp.depths.{depth - 1}")
    hook = module.register_forward_hook(lambda _, __, output: states.append(output[0]))
    with torch.no_grad():
        model(context)
        hook.remove()
        logits: Tensor = model.output(states[0][:, -1])
    return logits


def states_of(model: LanguageModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """The main model's states B x L x D, with zeros after the end of each text."""
    longest = max(map(len, texts))
    states_BLD = torch.zeros(len(texts), longest, 32, dtype=torch.float64)
    with torch.no_grad():
        for row, text in enumerate(texts):
            context = SequenceContext.of(torch.tensor([list(text)]))
            states_BLD[row, : len(text)] = model.hidden(context)[0]
    return states_BLD


def follow(drafter: Drafter, model: LanguageModel, texts: Sequence[Sequence[int]]) -> None:
    """Lets a drafter read what texts have that it has not read yet."""
    states = states_of(model, texts)
    new = [list(text[length:]) for text, length in zip(texts, drafter.lengths, strict=True)]
    width = max(map(len, new))
    tokens_BL = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in new])
    before = torch.zeros(len(texts), width, 32, dtype=torch.float64)
    for row, length in enumerate(drafter.lengths):
        before[row, : len(new[row])] = states[row, length - 1 : length - 1 + len(new[row])]
    drafter.follow(before, tokens_BL, [len(tokens) for tokens in new])


def drafted_logits(drafter: Drafter, drafts: int) -> list[Tensor]:
    """The logits of the next drafts, which depend on everything that the caches hold."""
    seen: list[Tensor] = []

    def choose(logits_BV: Tensor, number: int) -> Tensor:
        seen.append(logits_BV)
        return logits_BV.argmax(dim=-1)

    drafter.draft(drafts, choose)
    return seen


@pytest.mark.parametrize("case", first_by_default([(3, 3), (1, 3), (2, 2), (2, 5), (3, 1)]))
def test_drafts_are_the_training_forward_of_the_depths(case: tuple[int, int]) -> None:
    """Draft k from depth k; after the deepest one only the first draft of the last depth has such a forward."""
    depth, drafts = case
    model = model_with(depth)
    drafter = Drafter(model, drafts, 4, 24)
    texts = [[5, 9, 2, 7], [7, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [250, 3, 1]]
    follow(drafter, model, texts)
    seen: list[Tensor] = []

    def choose(logits_BV: Tensor, number: int) -> Tensor:
        seen.append(logits_BV)
        return torch.tensor([10, 20, 30, 40]) + number

    drafts_BN = drafter.draft(drafts, choose)
    assert drafts_BN.tolist() == [[first + k for k in range(drafts)] for first in (10, 20, 30, 40)]
    for row, text in enumerate(texts):
        for number in range(min(drafts, depth)):
            whole = [*text, *drafts_BN[row, :number].tolist()]
            if len(whole) <= number + 1:
                continue  # too short for this depth to have a position
            expected_V = slow_draft_logits(model, whole, number + 1)[0]
            torch.testing.assert_close(seen[number][row], expected_V, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", first_by_default([2, 1, 3]))
def test_after_drafts_the_caches_hold_exactly_what_was_accepted(depth: int) -> None:
    """Read in parts with drafts in between, or at once: the same entries, for texts from two tokens on."""
    model = model_with(depth)
    texts = [
        [5, 9, 2, 7, 1, 1, 4],
        [7, 3, 8, 2],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        [250, 3, 1, 2, 2],
    ]
    parts = [[4, 6], [2, 3], [7, 8], [2, 4]]
    drafter = Drafter(model, 4, 4, 24)
    for ends in zip(*parts, strict=True):
        follow(drafter, model, [text[:end] for text, end in zip(texts, ends, strict=True)])
        drafted_logits(drafter, 4)
    follow(drafter, model, texts)
    at_once = Drafter(model, 4, 4, 24)
    follow(at_once, model, texts)
    assert drafter.lengths == [7, 4, 10, 5]
    for number, caches in enumerate(drafter.caches, start=1):
        assert [cache.lengths.tolist() for cache in caches] == [
            [length - number for length in drafter.lengths]
        ]
    both = zip(drafted_logits(drafter, 4), drafted_logits(at_once, 4), strict=True)
    for found_BV, expected_BV in both:
        torch.testing.assert_close(found_BV, expected_BV, rtol=1e-10, atol=1e-10)


# ---- sampled text


def chi_square(drafts: int, rows: int = 800) -> float:
    """The statistic of texts of three tokens, of which each has three candidates: 27 outcomes, 26 degrees."""
    model = model_with(1)
    options = GenerationOptions(
        temperature=0.7, top_k=3, tokens=3, drafts=drafts, batch=rows, seed=5
    )
    prompts = [Prompt([5, 9, 2], 3, number) for number in range(rows)]
    found = Completer(model, options, None, None).complete(prompts)
    if drafts:
        assert 0.1 < sum(found.accepted) / sum(found.drafted) < 0.95
    texts = [tuple(one.tokens) for one in found]
    statistic = 0.0
    outcomes = 0
    for text, probability in outcomes_of(model, [5, 9, 2], 3):
        expected = rows * probability
        statistic += (texts.count(text) - expected) ** 2 / expected
        outcomes += texts.count(text)
    assert outcomes == rows, "nothing outside of the candidates is written"
    return statistic


def outcomes_of(
    model: LanguageModel, prompt: list[int], tokens: int
) -> list[tuple[tuple[int, ...], float]]:
    """Every text of some tokens and its probability under the model."""
    texts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(tokens):
        longer = []
        for text, probability in texts:
            p = distribution(next_logits(model, [*prompt, *text]).tolist(), 0.7, 3)
            longer += [
                ((*text, token), probability * p[token]) for token in range(len(p)) if p[token]
            ]
        texts = longer
    return texts


THRESHOLD = 54.05
"""The 0.999 quantile of chi-square with 26 degrees of freedom."""


def test_sampled_texts_have_the_models_distribution() -> None:
    """Chi-square over all texts of three tokens, with a fixed seed."""
    assert chi_square(drafts=2) < THRESHOLD


@pytest.mark.full
def test_the_test_of_the_distribution_sees_a_wrong_residual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A known mistake: drawing from the model's distribution, not from the residual, where a draft is rejected."""
    monkeypatch.setattr(core.generation.speculation, "residual", lambda p, q: p)
    assert chi_square(drafts=2) > 2 * THRESHOLD


@pytest.mark.full
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_sampled_texts_have_the_models_distribution_with_any_number_of_drafts(drafts: int) -> None:
    assert chi_square(drafts=drafts) < THRESHOLD


@pytest.mark.parametrize("drafts", first_by_default([2, 0]))
def test_a_sampled_text_is_the_same_in_any_batch(drafts: int) -> None:
    """By itself, or beside others; with drafts it is another text of the same distribution."""
    model = model_with(1)
    settings = {"tokens": 10, "temperature": 0.8, "top_p": 0.95, "seed": 3, "drafts": drafts}
    together = complete(model, PROMPTS, batch=4, **settings)  # type: ignore[arg-type]
    apart = complete(model, PROMPTS, batch=3, **settings)  # type: ignore[arg-type]
    assert [one.tokens for one in apart] == [one.tokens for one in together]
    assert len({tuple(one.tokens) for one in together}) == 4


def test_two_rows_with_one_prompt_are_drawn_apart() -> None:
    model = model_with(1)
    one, two = complete(model, [[5, 9, 2]] * 2, tokens=10, temperature=0.8)
    assert one.tokens != two.tokens


# ---- what cannot draft


def test_a_model_without_a_drafting_head_names_its_heads() -> None:
    model = tiny.build().eval()
    with pytest.raises(UserError, match=r"none of the model's loss heads drafts \(next_token\)"):
        complete(model, PROMPTS, drafts=1)


def test_a_cache_that_cannot_be_truncated_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(1)
    cache = type(model.new_caches(1, 1)[0])
    monkeypatch.setattr(cache, "truncates", False)
    with pytest.raises(UserError, match="cannot forget drafts that are rejected"):
        complete(model, PROMPTS, drafts=1)


@pytest.mark.full
def test_without_truncation_prompts_of_one_length_are_written_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compressed cache, for example; the end token of one row does not stop the others."""
    model = model_with(1)
    prompts = [[5, 9], [7], [250, 3], [8], [4, 4]]
    expected = [greedy(model, prompt, 8) for prompt in prompts]
    end = expected[0][3]
    cut = [text[: text.index(end)] if end in text else text for text in expected]
    cache = type(model.new_caches(1, 1)[0])
    monkeypatch.setattr(cache, "truncates", False)
    monkeypatch.delattr(cache, "truncate")
    batches = []
    monkeypatch.setattr(Writer, "__init__", _recording(Writer.__init__, batches))
    found = complete(model, prompts, tokens=8, end=end)
    assert [one.tokens for one in found] == cut
    assert batches == [3, 2]


def _recording(method, seen):  # type: ignore[no-untyped-def]
    def init(self, model, prompts, *arguments, **rest):  # type: ignore[no-untyped-def]
        seen.append(len(prompts))
        method(self, model, prompts, *arguments, **rest)

    return init


# ---- heads that read residual streams


STREAMS = (
    "model.residual={name: hyper_connections}",
    "model.heads.mtp={name: mtp, depth: 2, weight: 0.3, reads: streams}",
)


def test_a_head_that_reads_streams_drafts_what_its_forward_predicts() -> None:
    """Four streams, two modules, rows of different lengths; the text is that of the full forward."""
    model = model_with(2, *STREAMS)
    found = complete(model, PROMPTS, tokens=12, drafts=3)
    for one, prompt in zip(found, PROMPTS, strict=True):
        assert_greedy(model, prompt, one.tokens)
    assert 0 < sum(found.accepted) < sum(found.drafted)


def test_drafts_from_streams_are_those_of_the_training_forward() -> None:
    one_module = STREAMS[1].replace("depth: 2", "depth: 1")
    assert_counts_are_those_of_the_text(model_with(1, STREAMS[0], one_module))


def test_the_stream_is_kept_in_decoding_for_a_head_that_drafts_from_it_alone() -> None:
    tokens_BL = torch.tensor([[1, 2, 3]])
    for overrides, kept in ((STREAMS, True), (STREAMS[:1], False)):
        model = model_with(2, *overrides)
        decoded = model.read(tokens_BL, model.new_caches(1, 8))
        assert (decoded.stream is not None) == kept
