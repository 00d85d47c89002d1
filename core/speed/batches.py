"""The token ids that both sides of a comparison read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.analysis.budget import plan_of
from core.contracts.context import SequenceContext
from core.recipe.compose import Recipe


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch.

    Args:
        tokens_BL: int64 token ids.
        targets_BL: the token that follows each.
        first_sequence: number of the first sequence within the step.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    first_sequence: int = 0

    def context(self) -> SequenceContext:
        """The micro-batch as our layers read it."""
        return SequenceContext.of(
            self.tokens_BL, targets_BL=self.targets_BL, first_sequence=self.first_sequence
        )


def step_batches(recipe: Recipe, device: torch.device) -> list[TokenBatch]:
    """Random tokens of one optimizer step: a micro-batch for each that the recipe's first step accumulates.

    Random tokens are routed no more evenly than real ones, and no text has to be read.
    """
    generator = torch.Generator().manual_seed(0)
    sequences = recipe.batch.sequences
    size = (sequences, recipe.data.sequence_length + 1)
    found = []
    for index in range(plan_of(recipe).window(0).count):
        drawn_BM = torch.randint(recipe.data.tokenizer.vocab, size, generator=generator)
        tokens_BM = drawn_BM.to(device)
        tokens_BL = tokens_BM[:, :-1].contiguous()
        found.append(TokenBatch(tokens_BL, tokens_BM[:, 1:].contiguous(), index * sequences))
    return found


def prompts(recipe: Recipe, rows: int, length: int, device: torch.device) -> Tensor:
    """Random token ids, rows x length, that are continued."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(recipe.data.tokenizer.vocab, (rows, length), generator=generator)
    return drawn.to(device)
