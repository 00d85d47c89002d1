"""A recipe small enough to read, and the sentence that a mistake in it gives."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from core.contracts.errors import UserError
from core.recipe.compose import compose

BASE = """\
seed: 1
model:
  dim: 32
  attention: {name: mha, heads: 4}
  blocks:
    dense: {count: 1, ffn: {name: swiglu, hidden: 48}}
    moe:
      count: 2
      ffn:
        name: moe
        experts: 8
        expert_hidden: 16
        router: {name: deepseek_v3, top_k: 2, groups: 4, group_limit: 2, scale: 2.5}
        balance: [{name: bias, rate: 0.001}, {name: sequence, alpha: 0.0002}]
data: {corpus: {name: files, paths: [texts/*.txt]}, tokenizer: {vocab: 300}, sequence_length: 64}
optimizer: {name: adamw, lr: 0.001}
batch: {sequences: 4}
budget: {steps: 10}
loggers: []
smoke: {budget: {steps: 2}, model: {dim: 16}}
"""

PARTS = '''
    """A router that takes no bias and has keys of its own, a feed-forward that has one of another's, a corpus."""

    from dataclasses import dataclass
    from typing import Any

    from core.contracts.ffn import FeedForward
    from core.contracts.router import Router
    from core.contracts.schema import setting


    class Plain(Router):
        capabilities = frozenset({"learned"})
        top_k = forward = costs = None  # nothing here is built

        @dataclass(kw_only=True)
        class Config:
            top_k: int = setting(doc="experts per token")
            temperature: float = setting(1.0, doc="of the softmax")


    class Wide(FeedForward):
        forward = costs = None

        @dataclass(kw_only=True)
        class Config:
            hidden: int = setting(64, doc="inner width")
            branches: int = setting(2, doc="side by side")
'''
OFFERS = """
    from core.extension.hookspec import hookimpl

    CONTRACTS = "2.0"


    @hookimpl
    def register(registry):
        registry.router("plain", "loom_fake_parts:Plain")
        registry.ffn("wide", "loom_fake_parts:Wide")
"""

Write = Callable[..., Path]
MessageOf = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(text, name)` puts a recipe into the test's folder."""

    def put(text: str, name: str = "mine.yaml") -> Path:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return file

    return put


@pytest.fixture
def base(write: Write) -> Path:
    """The file of `BASE`."""
    return write(BASE, "base.yaml")


@pytest.fixture
def message_of() -> MessageOf:
    """`message_of(file, *overrides)` is the error message of composing it; it must be one sentence, in plain words."""

    def sentence(file: Path | str, *overrides: str, smoke: bool = False) -> str:
        with pytest.raises(UserError) as caught:
            compose(file, overrides, smoke=smoke)
        text = str(caught.value)
        assert "\n" not in text
        for word in (
            "Traceback",
            "DictConfig",
            "ListConfig",
            "object_type",
            "NoneType",
            "dataclass",
        ):
            assert word not in text
        return text

    return sentence


@pytest.fixture
def fake_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module for a recipe's `plugins:` that offers the router `plain` and the feed-forward `wide`."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "loom_fake.py").write_text(dedent(OFFERS))
    (folder / "loom_fake_parts.py").write_text(dedent(PARTS))
    monkeypatch.syspath_prepend(folder)
    yield "loom_fake"
    for name in ("loom_fake", "loom_fake_parts"):
        sys.modules.pop(name, None)
