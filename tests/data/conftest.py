"""Small corpora, and a cache of its own for every test."""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from core.contracts.corpus import Corpus, Document


class Texts(Corpus):
    """Documents held in memory, yielded in the order of the mapping."""

    def __init__(self, texts: Mapping[str, bytes]) -> None:
        super().__init__(None)
        self.texts = texts

    def documents(self) -> Iterator[Document]:
        for name, data in self.texts.items():
            yield Document(name=name, data=data, source=f"/texts/{name}")


MakeCorpus = Callable[[Mapping[str, bytes]], Corpus]


@pytest.fixture
def corpus_of() -> MakeCorpus:
    return Texts


@pytest.fixture
def texts() -> dict[str, bytes]:
    """25 documents of 200 words, drawn with a fixed seed; document 10 is held out."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(300)]
    return {
        f"doc-{index:02d}": " ".join(draw.choices(words, k=200)).encode() for index in range(25)
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, a new one for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOELOOM_CACHE", str(folder))
    return folder
