"""Several corpora that are trained on together, each with a share of the sequences."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from core.contracts.corpus import MixtureCorpus, MixturePart
from core.contracts.errors import ConfigError, UserError, nearest
from core.contracts.schema import Child, Section, children, setting

SMALLEST = 1e-4
"""The smallest share of the sequences: the order of parts repeats after 10,000 of them."""

NAME = re.compile(r"[A-Za-z0-9_-]+")
"""Names become parts of the names of columns and of documents."""


class Mixture(MixtureCorpus):
    """Several corpora; every sequence comes from one of them."""

    @dataclass(kw_only=True)
    class Config:
        """The corpora and their weights."""

        corpora: Child = children(
            "corpus", "mapping", doc="the corpora, under names of your choice"
        )
        weights: dict[str, float] = setting(
            doc="the share of each corpus in the training sequences, relative to the others"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for no corpus, a mixture among them, or weights that do not belong to them."""
            if not self.corpora:
                raise ConfigError("corpora", "must hold at least one corpus")
            for name, section in self.corpora.items():
                if not NAME.fullmatch(name):
                    why = f"a name must be of letters, digits, _ and -, as {name!r} is not"
                    raise ConfigError("corpora", why)
                if isinstance(section, Section) and issubclass(section.component, MixtureCorpus):
                    raise ConfigError("corpora", f"must hold no mixture, as {name} is one")
            self._check_weights()

        def _check_weights(self) -> None:
            for name in self.weights:
                if name not in self.corpora:
                    raise ConfigError(
                        "weights", f"unknown corpus {name}; {nearest(name, self.corpora)}"
                    )
            for name in self.corpora:
                if name not in self.weights:
                    raise ConfigError("weights", f"must give every corpus a weight, also {name}")
            for name, weight in self.weights.items():
                if not 0 < weight < math.inf:
                    raise ConfigError("weights", f"must be more than 0 and finite, also of {name}")
            total = sum(self.weights.values())
            for name, weight in self.weights.items():
                if weight / total < SMALLEST:
                    raise ConfigError(
                        "weights", f"must be at least {SMALLEST} of their sum, also of {name}"
                    )

    example: ClassVar[dict[str, Any]] = {
        "name": "mixture",
        "corpora": {
            "speeches": {"name": "package_text"},
            "mine": {"name": "files", "paths": ["texts/*.txt"]},
        },
        "weights": {"speeches": 0.75, "mine": 0.25},
    }

    def check_source(self) -> None:
        """Raises `UserError`, with the part's name, where a part has nothing to read."""
        for part in self.parts():
            try:
                part.corpus.check_source()
            except UserError as error:
                raise UserError(f"corpora.{part.name}: {error}") from error

    def notes(self) -> list[str]:
        """The notes of all parts, with their names."""
        found = []
        for part in self.parts():
            found += [f"{part.name}: {note}" for note in part.corpus.notes()]
        return found

    @cached_property
    def _parts(self) -> list[MixturePart]:
        parts = []
        for name, section in self.config.corpora.items():
            corpus = section.component(section.config)
            parts.append(MixturePart(name, corpus, float(self.config.weights[name])))
        return parts

    def parts(self) -> list[MixturePart]:
        """The corpora in the recipe's order, made once."""
        return self._parts
