"""What generation gives, written again as loops: one forward over the whole text for each token, lists of floats."""

import math
from collections.abc import Sequence

import torch
from model import tiny

from core.model.language_model import LanguageModel

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [250, 3]]

DEPTHS = {
    depth: (f"model.heads.mtp={{name: mtp, depth: {depth}, weight: 0.3}}",) for depth in (1, 2, 3)
}
"""Overrides that give the tiny model a multi-token module of a depth."""


def model_with(depth: int, *overrides: str) -> LanguageModel:
    """A tiny model in fp64 that mostly writes one of four tokens, so that drafts are often right."""
    model = tiny.build(*DEPTHS[depth], *overrides).eval()
    with torch.no_grad():
        model.output.weight[4:] *= 0.05
    return model


def next_logits(model: LanguageModel, text: Sequence[int]) -> torch.Tensor:
    """The logits V after the last token of a text."""
    with torch.no_grad():
        return model.logits(torch.tensor([list(text)]))[0, -1]


def greedy(model: LanguageModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """The most likely tokens, one after another."""
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(next_logits(model, text).argmax()))
    return text[len(prompt) :]


def assert_greedy(model: LanguageModel, prompt: Sequence[int], written: Sequence[int]) -> None:
    """Each token is the most likely one after those before it, by one forward over the whole text.

    By induction the text is then `greedy`'s.
    """
    assert written
    with torch.no_grad():
        logits_LV = model.logits(torch.tensor([[*prompt, *written[:-1]]]))[0]
    assert logits_LV[len(prompt) - 1 :].argmax(dim=-1).tolist() == list(written)


def distribution(
    logits: Sequence[float],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> list[float]:
    """The probabilities after temperature, then top-k, then top-p of what is left."""
    largest = max(logits)
    weights = [math.exp((value - largest) / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    if top_k is not None:
        order = order[:top_k]
    total = math.fsum(weights[token] for token in order)
    kept = []
    sum_before = 0.0
    for token in order:
        if sum_before < top_p:
            kept.append(token)
        sum_before += weights[token] / total
    total = math.fsum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]
