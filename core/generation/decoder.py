"""Reads prompts and new tokens of several rows with one model's caches."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from core.contracts.attention import Cache
from core.contracts.errors import UserError
from core.generation.graphs import lend_steps, on_device, reading_copies
from core.model.language_model import Decoded, LanguageModel


class Decoder:
    """The texts of several rows so far, as a model's caches hold them.

    A row is one text. Rows may have different lengths: a prompt is padded on the right, where no token of its row can
    see the padding, and the caches forget the padding at once.

    Args:
        model: the model in evaluation mode.
        rows: texts that are decoded together, B.
        capacity: tokens of each row that the caches can hold, padding included; the model reads at most
            `model.max_length`.
        device: where the model computes; None: where its weights are.

    Attributes:
        steps: steps that are replayed as CUDA graphs; None where they cannot be, on CPUs for example.
        lengths: the number of tokens of each row so far.
    """

    def __init__(
        self, model: LanguageModel, rows: int, capacity: int, device: torch.device | None = None
    ) -> None:
        self.model = model
        self.rows = rows
        self.capacity = capacity
        self.device = device or model.embedding.weight.device
        self.steps = lend_steps(self, model, rows, capacity, self.device)
        if self.steps is None:
            self.caches: list[Cache] = model.new_caches(rows, capacity, self.device)
        else:
            self.caches = self.steps.caches
        self.lengths = [0] * rows
        # Inference mode saves a sixth of a small model's time, but gathered weights outlive it.
        plain = all(type(weight) is nn.Parameter for weight in model.parameters())
        self._without_gradients = torch.inference_mode if plain else torch.no_grad

    @property
    def truncates(self) -> bool:
        """Whether rows can be shortened, as prompts of different lengths and rejected drafts need it."""
        return all(cache.truncates for cache in self.caches)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Decoded:
        """Reads a prompt for each row, all in one pass.

        The output layer runs for the last token of each row only.

        Args:
            prompts: at least one token id for each row.

        Returns:
            States B x L x D of all tokens, where L is the length of the longest prompt and those of padding have no
            meaning; logits B x 1 x V after the last token of each row.

        Raises:
            NotImplementedError: prompts of different lengths, and caches that cannot be truncated.
            UserError: a prompt is longer than the model reads.
        """
        counts = [len(prompt) for prompt in prompts]
        assert len(counts) == self.rows, "one prompt for each row"
        assert min(counts), "a prompt has at least one token"
        longest = max(counts)
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        tokens_BL = torch.tensor(padded, device=self.device)
        last_B = torch.tensor(counts, device=self.device) - 1
        return self._read(tokens_BL, counts, last_B)

    def step(self, tokens_BL: Tensor, counts: Sequence[int] | None = None) -> Decoded:
        """Reads the next tokens of each row.

        Args:
            tokens_BL: int64 token ids on the decoder's device, L for each row.
            counts: how many of these each row takes, from the left; the others count nowhere and are forgotten at
                once. A finished row takes none. None: every row takes all.

        Returns:
            States and logits of all L tokens; those of padding have no meaning.
        """
        if counts is None:
            counts = [tokens_BL.shape[1]] * self.rows
        return self._read(tokens_BL, counts, None)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets the tokens of each row past a length, rejected drafts for example.

        Raises:
            NotImplementedError: a cache cannot be truncated.
        """
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]
        self._truncate_caches()

    def _truncate_caches(self) -> None:
        lengths_B = torch.tensor(self.lengths)
        for cache in self.caches:
            cache.truncate(lengths_B)

    def _read(
        self, tokens_BL: Tensor, counts: Sequence[int], logits_at_B: Tensor | None
    ) -> Decoded:
        """Reads the first tokens of each row, and leaves no trace of the others."""
        lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if max(lengths) > self.model.max_length:
            raise UserError(
                f"{max(lengths)} tokens are more than model.rope.max_length = {self.model.max_length}"
            )
        new = tokens_BL.shape[1]
        valid_BL = None
        if min(counts) < new:
            counts_B1 = torch.tensor(counts, device=self.device)[:, None]
            valid_BL = torch.arange(new, device=self.device) < counts_B1
        # A compiled model would be compiled anew for every length of the caches.
        with (
            on_device(self.device),
            self._without_gradients(),
            torch.compiler.set_stance("force_eager"),
        ):
            if self.steps is not None and logits_at_B is None and self.steps.takes(new):
                decoded = self.steps.read(self.model, tokens_BL)
            else:
                with reading_copies(self.model) if self.steps is not None else nullcontext():
                    decoded = self.model.read(
                        tokens_BL, self.caches, valid_BL=valid_BL, logits_at_B=logits_at_B
                    )
        self.lengths = lengths
        if valid_BL is not None:
            self._truncate_caches()
        return decoded
