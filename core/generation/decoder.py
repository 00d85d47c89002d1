"""Reads prompts and new tokens of several rows with one model's caches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.contracts.attention import Cache
from core.model.language_model import Decoded, LanguageModel


class Decoder:
    """The texts of several rows so far, as a model's caches hold them.

    A row is one text. Rows may have different lengths: a prompt is padded on the right, where no token of its row can
    see the padding, and the caches forget the padding at once.

    Args:
        model: the model in evaluation mode.
        rows: texts that are decoded together, B.
        capacity: tokens of each row that the caches can hold; the model reads at most `model.max_length`.
        device: where the model computes; None: where its weights are.
    """

    def __init__(
        self, model: LanguageModel, rows: int, capacity: int, device: torch.device | None = None
    ) -> None:
        self.model = model
        self.rows = rows
        self.capacity = capacity
        self.device = device or model.embedding.weight.device
        self.caches: list[Cache] = model.new_caches(rows, capacity, self.device)

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each row so far: int64, on the decoder's device."""
        return self.caches[0].lengths

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
        """
        assert len(prompts) == self.rows, "one prompt for each row"
        assert all(prompts), "a prompt has at least one token"
        counts = [len(prompt) for prompt in prompts]
        longest = max(counts)
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        tokens_BL = torch.tensor(padded, device=self.device)
        counts_B = torch.tensor(counts, device=self.device)
        if min(counts) == longest:
            return self._read(tokens_BL, None, counts_B - 1)
        valid_BL = torch.arange(longest, device=self.device) < counts_B[:, None]
        lengths_B = self.lengths + counts_B
        decoded = self._read(tokens_BL, valid_BL, counts_B - 1)
        self.truncate(lengths_B)
        return decoded

    def step(self, tokens_BL: Tensor, valid_BL: Tensor | None = None) -> Decoded:
        """Reads the next L tokens of each row.

        Args:
            tokens_BL: int64 token ids on the decoder's device.
            valid_BL: bool, False for tokens on the right of a row that count nowhere, because the row is finished, for
                example; `truncate` then removes them. None: all are valid.

        Returns:
            States and logits of all L tokens.
        """
        return self._read(tokens_BL, valid_BL, None)

    def truncate(self, lengths_B: Tensor) -> None:
        """Forgets the tokens of each row past a length: padding, rejected drafts.

        Raises:
            NotImplementedError: a cache cannot be truncated.
        """
        for cache in self.caches:
            cache.truncate(lengths_B)

    @torch.no_grad()
    def _read(
        self, tokens_BL: Tensor, valid_BL: Tensor | None, logits_at_B: Tensor | None
    ) -> Decoded:
        # A compiled model would be compiled anew for every length of the caches.
        with torch.compiler.set_stance("force_eager"):
            return self.model.read(
                tokens_BL, self.caches, valid_BL=valid_BL, logits_at_B=logits_at_B
            )
