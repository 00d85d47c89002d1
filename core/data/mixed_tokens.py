"""Mixtures whose parts are all corpora of tokens."""

from collections.abc import Iterator
from dataclasses import replace

from core.contracts.corpus import (
    Corpus,
    MixtureCorpus,
    MixturePart,
    Split,
    TokenBlock,
    TokenCorpus,
)
from core.contracts.errors import UserError
from core.data.held_out import HeldOut
from core.data.token_split import TokenSplit


def holds_tokens(corpus: Corpus) -> bool:
    """Whether a corpus holds token ids and no text."""
    if isinstance(corpus, MixtureCorpus):
        return all(part.corpus.as_tokens() is not None for part in corpus.parts())
    return corpus.as_tokens() is not None


class MixedTokens(TokenCorpus):
    """The blocks of several corpora of tokens, one corpus after the other; the number of each is its blocks' source.

    Args:
        parts: the corpora, which must have one vocabulary and one tokenizer.
        held_out: how the validation split of each part is chosen.

    Raises:
        UserError: the parts do not go together.
    """

    def __init__(self, parts: list[MixturePart], held_out: HeldOut) -> None:
        super().__init__(None)
        self._parts = []
        own = _validation_parts(parts, held_out)
        for part in parts:
            tokens = part.corpus.as_tokens()
            assert tokens is not None
            chosen = HeldOut(held_out.fraction, own.get(part.name))
            self._parts.append(TokenSplit(tokens, chosen))
        first = self._parts[0]
        for part, split in zip(parts, self._parts, strict=True):
            if split.vocabulary != first.vocabulary or (
                split.tokenizer_json() != first.tokenizer_json()
            ):
                raise UserError(
                    f"the part {part.name!r} of the mixture has another tokenizer than "
                    f"{parts[0].name!r}: they must have the same"
                )

    @property
    def vocabulary(self) -> int | None:
        """The parts'."""
        return self._parts[0].vocabulary

    def tokenizer_json(self) -> str | None:
        """The parts'."""
        return self._parts[0].tokenizer_json()

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        """Yields the blocks of every part."""
        for number, part in enumerate(self._parts):
            for block in part.blocks(split):
                yield replace(block, source=number)


def _validation_parts(parts: list[MixturePart], held_out: HeldOut) -> dict[str, Corpus]:
    """The validation corpus of each part; none where parts hold out some of their own."""
    if held_out.corpus is None:
        return {}
    own: dict[str, Corpus] = {}
    if isinstance(held_out.corpus, MixtureCorpus):
        own = {part.name: part.corpus for part in held_out.corpus.parts()}
    names = [part.name for part in parts]
    if sorted(own) != sorted(names):
        raise UserError(
            "data.validation must be a mixture of the same parts as data.corpus, which holds token ids: "
            f"{', '.join(names)}"
        )
    return own
