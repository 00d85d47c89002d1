"""Writing text with a model: one token at a time from its caches."""

from collections.abc import Callable, Iterator, Sequence

import torch

from core.contracts.errors import NotFiniteError
from core.model.language_model import LanguageModel
from core.numerics.finite import first_not_finite


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float = 0.0,
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
        top_p: sample from the smallest set of tokens whose probabilities add up to this.
        seed: seed of the draws.
        stop: a token that ends the text and is not yielded.
        device: where tokens are given to the model; None: where its weights are.
        agreed: maps each chosen token to the one that is taken; ranks that decode together agree on one by it.

    Raises:
        NotFiniteError: the model's logits are not finite, so that no token is more likely than another.
    """
    device = device or next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    caches = model.new_caches(1, min(len(prompt) + tokens, model.max_length), device)
    new_tokens = list(prompt)
    for _ in range(tokens):
        # A compiled model would be compiled anew for every length of the caches.
        with torch.compiler.set_stance("force_eager"):
            logits_V = model.decode(torch.tensor([new_tokens], device=device), caches)[0, -1]
        check_logits(logits_V)
        token = agreed(_choose(logits_V.double().cpu(), temperature, top_p, generator))
        if token == stop:
            return
        yield token
        new_tokens = [token]


def check_logits(logits: torch.Tensor) -> None:
    """Raises `NotFiniteError` for logits that are not finite, whose `argmax` would be an arbitrary token."""
    index = first_not_finite(logits)
    if index is not None:
        value = float(logits[index])
        raise NotFiniteError(f"the model's logits are not finite ({value} for token {index[-1]})")


def _choose(
    logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """The most likely token at temperature 0, else a draw from the `top_p` most likely ones."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V, order_V = (logits_V / temperature).softmax(dim=0).sort(descending=True)
    before_V = probabilities_V.cumsum(dim=0) - probabilities_V
    probabilities_V = probabilities_V.masked_fill(before_V >= top_p, 0)
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])
