"""A needle in a haystack: whether a model uses what a text said long ago.

A sentence with a key is hidden in real text, and the text ends with the same sentence up to the key. The model is asked
for the probability of the key. Small models seldom name it, so the probability is compared with that of the same key in
the same text with another key in the sentence.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax

from core.contracts.context import SequenceContext
from core.model.language_model import LanguageModel
from core.statistics.comparison import Interval, interval

BEFORE, AFTER = "\nThe pass key is", ".\n"
"""What stands before and after the key."""

KEY = 4
"""Tokens of a key."""


@dataclass(frozen=True)
class Needle:
    """One text with a needle, and the same text with another key.

    Args:
        tokens: the text with the question and the key that answers it: L + 1 tokens.
        control: the same with another key in the needle.
        place: where the needle begins.
    """

    tokens: list[int]
    control: list[int]
    place: int


@dataclass(frozen=True)
class NeedleScore:
    """How a model answers for needles at one depth of texts of one length.

    Args:
        length: tokens that the model reads, L.
        depth: the part of the other text that stands before the needle.
        tries: how many texts.
        exact: texts for which the model would write the whole key, greedily.
        control_exact: the same without the key in the text.
        nats: log p of the key.
        gain: log p of the key minus that without it in the text, with its 95% interval.
    """

    length: int
    depth: float
    tries: int
    exact: int
    control_exact: int
    nats: float
    gain: Interval


def other_tokens(length: int, before: Sequence[int], after: Sequence[int]) -> int:
    """The tokens of the other text in a text of `length` tokens with a needle; negative where it has no place."""
    return length - 2 * (len(before) + KEY) - len(after)


def needles(
    stream: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    begin: int,
    *,
    length: int,
    depth: float,
    tries: int,
    seed: int,
) -> Iterator[Needle]:
    """Draws texts of exactly `length` + 1 tokens, each with a needle.

    The text around it and the tokens of the keys are drawn from the stream by the seed and the number of the try, so
    that all lengths, depths and models have the same keys.

    Args:
        stream: real text that the model was not trained on.
        before: the tokens before the key.
        after: those after it.
        begin: the marker before a text.
        length: tokens that the model reads.
        depth: the part of the other text that stands before the needle, 0 to 1.
        tries: how many.
        seed: the seed of the draws.

    Raises:
        ValueError: the text or the stream is too short.
    """
    other = other_tokens(length, before, after)
    if other < 0 or other > len(stream):
        raise ValueError(f"{length} tokens have no place for a needle")
    for number in range(tries):
        draw = random.Random(f"{seed} {number}")
        key = [stream[draw.randrange(len(stream))] for _ in range(KEY)]
        wrong = [_other_than(token, stream, draw) for token in key]
        start = int(draw.random() * (len(stream) - other + 1))
        text = list(stream[start : start + other])
        place = round(depth * other)
        texts = []
        for hidden in (key, wrong):
            needle = [*before, *hidden, *after]
            texts.append([begin, *text[:place], *needle, *text[place:], *before, *key])
        yield Needle(texts[0], texts[1], 1 + place)


def _other_than(token: int, stream: Sequence[int], draw: random.Random) -> int:
    """A token of the stream that is not `token`, if a few draws find one."""
    found = token
    for _ in range(100):
        found = stream[draw.randrange(len(stream))]
        if found != token:
            break
    return found


@torch.no_grad()
def score_needles(
    model: LanguageModel, drawn: Iterator[Needle], length: int, depth: float
) -> NeedleScore:
    """Scores the keys of some needles.

    Args:
        model: the model in evaluation mode.
        drawn: the texts.
        length: tokens of each that the model reads.
        depth: the depth of the needles.
    """
    nats, gains = [], []
    exact = control_exact = 0
    for needle in drawn:
        score, found = _answer(model, needle.tokens)
        control, found_without = _answer(model, needle.control)
        nats.append(score)
        gains.append(score - control)
        exact += found
        control_exact += found_without
    return NeedleScore(
        length,
        depth,
        len(nats),
        exact,
        control_exact,
        sum(nats) / len(nats),
        interval(gains),
    )


def _answer(model: LanguageModel, tokens: list[int]) -> tuple[float, bool]:
    """log p of the last `KEY` tokens after the others, and whether each of them is the most likely one."""
    device = model.embedding.weight.device
    ids = torch.tensor(tokens, device=device)
    hidden_BLD, _ = model.hidden(SequenceContext.of(ids[None, :-1]))
    logits_KV = model.output(hidden_BLD[0, -KEY:]).double()
    key_K = ids[-KEY:]
    nats = log_softmax(logits_KV, dim=-1).gather(1, key_K[:, None]).sum()
    return float(nats), bool((logits_KV.argmax(dim=-1) == key_K).all())
