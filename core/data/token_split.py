"""The split of a corpus of tokens as a recipe asks for it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from math import ceil

from core.contracts.corpus import Split, TokenBlock, TokenCorpus
from core.contracts.errors import UserError
from core.data.held_out import HeldOut


class TokenSplit(TokenCorpus):
    """A corpus of tokens with another validation split.

    Args:
        corpus: the corpus; by default its own split is kept.
        held_out: a fraction: the last blocks of both sides together, or the end of every block where there are too
            few. A corpus: all of its blocks are validated on, and all of the first one's are trained on.
    """

    def __init__(self, corpus: TokenCorpus, held_out: HeldOut) -> None:
        super().__init__(corpus.config)
        self._corpus = corpus
        self._fraction = held_out.fraction
        self._validation: TokenCorpus | None = None
        if held_out.corpus is not None:
            self._validation = held_out.corpus.as_tokens()
            self._check_validation()

    def _check_validation(self) -> None:
        if self._validation is None:
            raise UserError(
                "data.validation holds text, and data.corpus token ids: both must hold token ids"
            )
        if self._validation.vocabulary != self._corpus.vocabulary:
            raise UserError(
                f"data.validation has a vocabulary of {self._validation.vocabulary} entries, and "
                f"data.corpus one of {self._corpus.vocabulary}: they must be the same"
            )
        if self._validation.tokenizer_json() != self._corpus.tokenizer_json():
            raise UserError("data.validation and data.corpus must have the same tokenizer")

    @property
    def vocabulary(self) -> int | None:
        """The corpus's."""
        return self._corpus.vocabulary

    def tokenizer_json(self) -> str | None:
        """The corpus's."""
        return self._corpus.tokenizer_json()

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        """Yields the blocks of one side."""
        if self._validation is not None:
            return _all(self._corpus if split == "train" else self._validation)
        if self._fraction is None:
            return self._corpus.blocks(split)
        return self._fractions(split, self._fraction)

    def _fractions(self, split: Split, fraction: float) -> Iterator[TokenBlock]:
        count = sum(1 for _ in _all(self._corpus))
        held = int(fraction * count + 1e-9)
        for index, block in enumerate(_all(self._corpus)):
            if held:
                if (index >= count - held) == (split == "validation"):
                    yield block
                continue
            part = _part(block, split, fraction)
            if len(part.tokens):
                yield part


def _all(corpus: TokenCorpus) -> Iterator[TokenBlock]:
    """Yields the blocks of both sides."""
    return chain(corpus.blocks("train"), corpus.blocks("validation"))


def _part(block: TokenBlock, split: Split, fraction: float) -> TokenBlock:
    """The beginning of a block for training, or its end for validation."""
    place = len(block.tokens) - ceil(len(block.tokens) * fraction)
    part = slice(0, place) if split == "train" else slice(place, None)
    learned = None if block.learned is None else block.learned[part]
    # the text of a part is not known where the block's is
    return replace(block, tokens=block.tokens[part], learned=learned, text_bytes=0)
