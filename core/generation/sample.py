"""Continues one prompt, token by token."""

from collections.abc import Callable, Iterator, Sequence

import torch

from core.generation.options import GenerationOptions
from core.generation.writer import Prompt, Writer
from core.model.language_model import LanguageModel


def sample(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    device: torch.device | None = None,
    agreed: Callable[[int], int] = int,
) -> Iterator[int]:
    """Yields the tokens that continue a prompt.

    Args:
        model: the model in evaluation mode.
        prompt: at least one token id.
        tokens: how many to write at most.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: draw from this many most likely tokens only; None: from all.
        top_p: draw from the smallest set of tokens whose probabilities add up to this.
        seed: seed of the draws.
        stop: a token that ends the text and is not yielded.
        device: where tokens are given to the model; None: where its weights are.
        agreed: maps each chosen token to the one that is taken; ranks that decode together agree on one by it.

    Raises:
        NotFiniteError: the model's logits are not finite, so that no token is more likely than another.
    """
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    writer = Writer(model, [Prompt(prompt, tokens)], options, device=device, agreed=agreed)
    while writer.is_open:
        ((token,),) = writer.advance()
        if token == stop:
            return
        yield token
