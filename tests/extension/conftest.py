"""Distributions that pip never saw: a `.dist-info` folder and a module, in a folder on `sys.path`."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from core.extension.loader import installed_registry

CORPUS = '''
    """A corpus of one document, which is the name of its module."""

    from dataclasses import dataclass

    from core.contracts.corpus import Corpus, Document
    from core.contracts.schema import setting
    from core.extension.hookspec import hookimpl

    CONTRACTS = "2.0"


    @hookimpl
    def register(registry):
        registry.corpus("probe", __name__ + ":Probe")


    class Probe(Corpus):
        @dataclass(kw_only=True)
        class Config:
            size: int = setting(1, doc="documents")

        def documents(self):
            yield Document(name=__name__, data=b"", source=__name__)
'''

Module = Callable[..., str]
Install = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python finds modules and distributions in; what was imported from it is forgotten again."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for variable in ("STRICT", "DISABLE", "TRACE"):
        monkeypatch.delenv(f"MOELOOM_{variable}_PLUGINS", raising=False)
    before = set(sys.modules)
    installed_registry.cache_clear()
    yield folder
    installed_registry.cache_clear()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def module(site: Path) -> Module:
    """`module(name, source)` writes a module; without a source, one that offers the corpus `probe`."""

    def write(name: str, source: str = CORPUS) -> str:
        (site / f"{name}.py").write_text(dedent(source))
        return name

    return write


@pytest.fixture
def install(site: Path) -> Install:
    """`install(distribution, version, entry_point=module, ...)` makes a distribution that offers plugins."""

    def make(distribution: str, version: str = "1.0", /, **points: str) -> None:
        folder = site / f"{distribution}-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata)
        lines = "".join(f"{point} = {target}\n" for point, target in points.items())
        (folder / "entry_points.txt").write_text(f"[moeloom.plugins]\n{lines}")

    return make
