"""Greedy continuations of several prompts at once, decoded with key-value caches."""

from collections.abc import Callable, Sequence

import torch

from core.model.language_model import LanguageModel
from core.model.sampling import check_logits


@torch.no_grad()
def write(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Continues prompts of equal length greedily.

    The lengths are equal because all sequences of a batch share their positions. So there is no padding and no mask,
    and each row is the same as if its prompt were alone.

    Args:
        model: the model in evaluation mode.
        prompts: token ids, at least one each.
        tokens: the largest number of tokens to write.
        ended: called with the written tokens after each token; returns whether they are complete.

    Returns:
        The continuation of each prompt, its last token included.

    Raises:
        NotFiniteError: the model's logits are not finite.
    """
    assert len(set(map(len, prompts))) == 1, "prompts of one batch are equally long"
    device = model.embedding.weight.device
    caches = model.new_caches(len(prompts), min(len(prompts[0]) + tokens, model.max_length))
    fed_BL = torch.tensor([list(prompt) for prompt in prompts], device=device)
    written: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for _ in range(tokens):
        logits_BV = model.decode(fed_BL, caches)[:, -1]
        check_logits(logits_BV)
        chosen_B = logits_BV.argmax(dim=-1)
        for row, token in enumerate(chosen_B.tolist()):
            if row in going:
                written[row].append(token)
                if ended(written[row]):
                    going.remove(row)
        if not going:
            break
        fed_BL = chosen_B[:, None]
    return written
