"""Drafts change how fast a text comes, and nothing else."""

import pytest
import torch
from model import tiny
from tiers import first_by_default

from core.generation.completion import complete
from core.model.language_model import LanguageModel

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [250, 3]]
DEPTHS = {
    depth: (f"model.heads.mtp={{name: mtp, depth: {depth}, weight: 0.3}}",) for depth in (1, 2, 3)
}


def model_with(depth: int, *overrides: str, agreeable: bool = True) -> LanguageModel:
    """A tiny model in fp64; `agreeable` leaves it few tokens to choose from, so that drafts are often right."""
    model = tiny.build(*DEPTHS[depth], *overrides).eval()
    if agreeable:
        with torch.no_grad():
            model.output.weight[4:] *= 0.05
    return model


def greedy(model: LanguageModel, prompt: list[int], tokens: int) -> list[int]:
    """The most likely tokens, each from a forward over the whole text."""
    text = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            text.append(int(model.logits(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "case", first_by_default([(2, 3), (1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (3, 5)])
)
def test_greedy_text_with_drafts_is_the_text_of_the_full_forward(case: tuple[int, int]) -> None:
    depth, drafts = case
    model = model_with(depth)
    found = complete(model, PROMPTS, tokens=12, drafts=drafts)
    assert [one.tokens for one in found] == [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert 0 < sum(found.accepted) < sum(found.drafted)
    assert len(found.accepted) == drafts
    assert found.accepted == sorted(found.accepted, reverse=True)
