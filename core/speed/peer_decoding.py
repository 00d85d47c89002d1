"""The peer continues prompts, by `generate`."""

from typing import Any

import torch
from torch import nn

from core.recipe.compose import Recipe
from core.speed.batches import prompts
from core.speed.peer import PeerFolder, experts_implementations, load
from core.speed.task import COMPILED, Text

CACHES: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    f"static cache, {COMPILED}": {"cache_implementation": "static"},
}
"""The caches of `generate` by name, with its arguments; it compiles by itself with a static cache on a GPU."""

SEPARATOR = " / "


def decoding_variants(*, prefill: bool = False) -> list[str]:
    """Every implementation of experts with every cache; for the first token alone with the plain cache."""
    caches = list(CACHES)[:1] if prefill else list(CACHES)
    found = []
    for cache in caches:
        for experts in experts_implementations():
            found.append(f"{experts}{SEPARATOR}{cache}")
    return found


class PeerDecoding:
    """A model in transformers that continues random prompts with its most likely tokens.

    Args:
        folder: the exported model.
        recipe: its vocabulary is drawn from.
        text: the prompts, and how much is written.
        device: where.
    """

    def __init__(
        self, folder: PeerFolder, recipe: Recipe, text: Text, device: torch.device
    ) -> None:
        self.model = load(folder, device).eval()
        self.model.generation_config.eos_token_id = None
        self.weights: list[nn.Parameter] = list(self.model.parameters())
        self.optimizers: list[torch.optim.Optimizer] = []
        self._prompts_BL = prompts(recipe, text.rows, text.context, device)
        self._text = text
        self._arguments: dict[str, Any] = {}

    def use(self, variant: str) -> None:
        """Selects an implementation of experts and a cache."""
        from transformers.generation.configuration_utils import CompileConfig

        experts, _, cache = variant.partition(SEPARATOR)
        if self.model.config._experts_implementation != experts:
            self.model.set_experts_implementation(experts)
        self._arguments = dict(CACHES[cache])
        if cache.endswith(COMPILED):
            compiling: Any = CompileConfig()
            compiling._compile_all_devices = True  # what its own tests set to compile on CPUs
            self._arguments["compile_config"] = compiling

    def run(self) -> list[list[int]]:
        """Continues all prompts: one whole call."""
        return self.written(self._text.new)

    @torch.no_grad()
    def written(self, new: int) -> list[list[int]]:
        """Continues all prompts by some number of tokens."""
        found = self.model.generate(
            self._prompts_BL,
            attention_mask=torch.ones_like(self._prompts_BL),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            **self._arguments,
        )
        tokens: list[list[int]] = found[:, self._text.context :].tolist()
        return tokens
