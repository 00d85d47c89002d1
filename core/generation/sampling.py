"""Chooses tokens from logits.

Nothing is drawn from a stream: each draw is addressed by (seed, what it is for, number of the prompt, position in the
text). So the text of a prompt does not depend on the batch that it is in, nor on how many drafts were made.
"""

import torch
from torch import Tensor

from core.contracts.errors import NotFiniteError
from core.generation.options import GenerationOptions
from core.numerics.finite import first_not_finite
from core.routing.chance import uniform


def check_logits(logits: Tensor) -> None:
    """Raises `NotFiniteError` for logits that are not finite, whose `argmax` would be an arbitrary token."""
    index = first_not_finite(logits)
    if index is not None:
        value = float(logits[index])
        raise NotFiniteError(f"the model's logits are not finite ({value} for token {index[-1]})")


def probabilities(logits: Tensor, options: GenerationOptions) -> Tensor:
    """The distribution that tokens are drawn from: fp64, ... x V as the logits are.

    Temperature comes first, then `top_k`, then `top_p` of what `top_k` has left; the rest is scaled up to 1. Of equally
    likely tokens the lower id counts as the more likely one. At temperature 0 one token has all the probability.
    """
    if options.greedy:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, best, 1.0)
    logits = logits.to(torch.float64)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # nothing overflows at a tiny temperature
    p = (logits / options.temperature).softmax(dim=-1)
    if options.top_k is None and options.top_p == 1:
        return p
    sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
    if options.top_k is not None:
        sorted_p[..., options.top_k :] = 0
        sorted_p = sorted_p / sorted_p.sum(dim=-1, keepdim=True)
    before = sorted_p.cumsum(dim=-1) - sorted_p
    dropped = before >= options.top_p
    dropped[..., 0] = False
    sorted_p = sorted_p.masked_fill(dropped, 0)
    kept = torch.zeros_like(p).scatter(-1, order, sorted_p)
    return kept / kept.sum(dim=-1, keepdim=True)


def draw(p: Tensor, u: Tensor) -> Tensor:
    """The token of each distribution at which its cumulative sum passes u: int64, of the shape of u.

    A token without probability is never drawn, whatever the sum's rounding.

    Args:
        p: ... x V, non-negative; it need not add up to 1.
        u: ... numbers in [0, 1).
    """
    sums = p.cumsum(dim=-1)
    total = sums[..., -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(u[..., None] * total, below_total)
    token: Tensor = torch.searchsorted(sums, target, right=True)[..., 0]
    return token


class Draws:
    """The random numbers of some rows.

    Args:
        seed: the seed.
        numbers: the number of each row's prompt among all prompts.
        device: where the numbers are made.
    """

    def __init__(self, seed: int, numbers: list[int], device: torch.device) -> None:
        self.seed = seed
        self.numbers_B = torch.tensor(numbers, device=device)

    def __call__(self, what: str, positions: Tensor) -> Tensor:
        """Numbers in [0, 1), fp64, one for each position in the text: B, or B x L, as the positions are."""
        numbers_B = self.numbers_B
        if positions.dim() == 2:
            numbers_B = numbers_B[:, None]
        return uniform(self.seed, what, numbers_B, positions)
