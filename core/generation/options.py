"""The settings of generation, and what each may be; torch is not needed to check them."""

from collections.abc import Callable
from dataclasses import dataclass

from core.contracts.errors import UserError

TOKENS = 128
"""Most tokens of a text, unless a number is given."""

BATCH = 8
"""Rows that are decoded together, unless a number is given."""

MOST_DRAFTS = 64
"""Most drafts in a pass: each needs a pass of the drafting module."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How texts are continued.

    Args:
        tokens: most tokens of each text; None: 128, or as many as the model reads after its prompt.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: draw from this many most likely tokens only; None: from all.
        top_p: draw from the smallest set of most likely tokens, after `top_k`, whose probabilities add up to this.
        seed: seed of the draws. A draw is addressed by the seed, the number of the prompt and the position in the text.
        stop: strings that end a text, which ends before them.
        batch: rows that are decoded together.
        drafts: tokens that the model's drafting head proposes for each pass of the model; 0: one token at a time.
    """

    tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch: int = BATCH
    drafts: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and nothing is drawn."""
        return self.temperature == 0

    def check(self, name: Callable[[str], str] = str) -> None:
        """Checks every setting.

        Args:
            name: how a setting is called in an error message, from its name here.

        Raises:
            UserError: a setting that cannot be used, with its value and what is allowed.
        """
        for key in ("tokens", "top_k", "batch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{name(key)} = {value}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"{name('temperature')} = {self.temperature}: must be a number of at least 0"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"{name('top_p')} = {self.top_p}: must be more than 0 and at most 1")
        if not 0 <= self.drafts <= MOST_DRAFTS:
            raise UserError(f"{name('drafts')} = {self.drafts}: must be 0 to {MOST_DRAFTS}")
        if "" in self.stop:
            raise UserError(f"{name('stop')} '': must have at least one character")

    def limit(
        self, prompt_tokens: int, max_length: int, where: str, name: Callable[[str], str] = str
    ) -> int:
        """The most tokens that are written after a prompt.

        Args:
            prompt_tokens: tokens of the prompt.
            max_length: tokens that the model reads; the last token that is written is not read.
            where: begins the error message: which prompt this is.
            name: how a setting is called in the error message.

        Raises:
            UserError: the prompt and what is to be written are too long for the model.
        """
        longest = max_length + 1
        most = longest - prompt_tokens
        if most < (self.tokens or 1):
            wanted = f"{name('tokens')} {self.tokens or 1}"
            raise UserError(
                f"{where} of {prompt_tokens} tokens with the marker, {wanted}: together at most {longest}, because "
                f"the model reads model.rope.max_length = {max_length}"
            )
        return self.tokens or min(TOKENS, most)
