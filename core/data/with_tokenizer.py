"""Corpora that are read with a tokenizer from a file, alone or as parts of a mixture."""

from dataclasses import replace

from core.contracts.corpus import Corpus, MixtureCorpus, MixturePart
from core.contracts.errors import UserError
from core.data.held_out import HeldOut
from core.data.tokenizer import Tokenizer


class _WithTokenizer(MixtureCorpus):
    """A mixture whose parts have got a tokenizer."""

    def __init__(self, mixture: MixtureCorpus, parts: list[MixturePart]) -> None:
        super().__init__(mixture.config)
        self._mixture = mixture
        self._parts = parts

    def parts(self) -> list[MixturePart]:
        """Returns the parts."""
        return self._parts

    def notes(self) -> list[str]:
        """Returns the notes of the mixture."""
        return self._mixture.notes()


def needs_tokenizer(corpus: Corpus) -> bool:
    """Whether a corpus, or a part of a mixture, is read with a tokenizer from a file."""
    if isinstance(corpus, MixtureCorpus):
        return any(needs_tokenizer(part.corpus) for part in corpus.parts())
    return corpus.needs_tokenizer


def with_tokenizer(corpus: Corpus, tokenizer: Tokenizer | None) -> Corpus:
    """The corpus as it is read with a tokenizer from a file; one that needs none is returned as it is.

    Raises:
        UserError: the corpus needs one, and there is none, or it has no chat template.
    """
    if not needs_tokenizer(corpus):
        return corpus
    if tokenizer is None:
        raise UserError(
            "data.tokenizer.file = null: must name a tokenizer with a chat template, as the corpus "
            "holds conversations"
        )
    if isinstance(corpus, MixtureCorpus):
        parts = [
            replace(part, corpus=with_tokenizer(part.corpus, tokenizer)) for part in corpus.parts()
        ]
        return _WithTokenizer(corpus, parts)
    # It imports Jinja, which other corpora do not need.
    from core.data.conversations import ChatTokenizer

    return corpus.with_tokenizer(ChatTokenizer.of(tokenizer))


def held_out_with(held_out: HeldOut, tokenizer: Tokenizer | None) -> HeldOut:
    """The choice of validation text, whose corpus has got the tokenizer too."""
    if held_out.corpus is None:
        return held_out
    return replace(held_out, corpus=with_tokenizer(held_out.corpus, tokenizer))
