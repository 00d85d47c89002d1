"""What the scores must be: one sequence, one forward, one token after another."""

from collections.abc import Sequence

import torch

from core.model.language_model import LanguageModel


def log_likelihood(model: LanguageModel, ids: Sequence[int], scored: int) -> float:
    """Sum of log p of the last `scored` tokens, each from all tokens before it."""
    total = 0.0
    for place in range(len(ids) - scored, len(ids)):
        p_V = next_distribution(model, ids[:place])
        total += float(torch.log(p_V[ids[place]]))
    return total


def greedy(model: LanguageModel, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest token again and again."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(next_distribution(model, ids).argmax()))
    return ids[len(prompt) :]


def next_distribution(model: LanguageModel, ids: Sequence[int]) -> torch.Tensor:
    """Probabilities V of the token after these, by the definition of the softmax."""
    with torch.no_grad():
        logits_V = model.logits(torch.tensor([list(ids)]))[0, -1].double()
    weights_V = torch.exp(logits_V - logits_V.max())
    return weights_V / weights_V.sum()
