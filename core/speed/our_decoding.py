"""Our model continues prompts."""

import torch
from torch import nn

from core.assemble import build
from core.generation.completion import complete
from core.recipe.compose import Recipe
from core.speed.batches import prompts
from core.speed.task import Text


class OurDecoding:
    """A model of ours that continues random prompts with its most likely tokens, by `core.complete`.

    Args:
        recipe: the model.
        text: the prompts, and how much is written.
        device: where.
    """

    def __init__(self, recipe: Recipe, text: Text, device: torch.device) -> None:
        self.model = build(recipe, device=str(device)).eval()
        self.weights: list[nn.Parameter] = list(self.model.parameters())
        self.optimizers: list[torch.optim.Optimizer] = []
        self._prompts = prompts(recipe, text.rows, text.context, device).tolist()
        self._text = text

    def run(self) -> list[list[int]]:
        """Continues all prompts: one whole call."""
        return self.written(self._text.new)

    def written(self, new: int) -> list[list[int]]:
        """Continues all prompts by some number of tokens."""
        found = complete(self.model, self._prompts, tokens=new, batch=self._text.rows)
        return [completion.tokens for completion in found]

    @torch.no_grad()
    def gap(self, row: int, written: list[int]) -> float:
        """The difference of the two largest logits after a prompt and what was written of it, in our full forward."""
        tokens = torch.tensor([self._prompts[row] + written], device=self.weights[0].device)
        first, second = self.model.logits(tokens)[0, -1].double().topk(2).values.tolist()
        return float(first - second)
