"""A small model in fp64 with its initial weights, which reads 24 tokens, and the small run's tokenizer."""

from pathlib import Path

import pytest
from lab import Lab

from core.assemble import build
from core.data.tokenizer import Tokenizer
from core.model.language_model import LanguageModel

LONGEST = 24
GROUPS = "model.blocks.moe.ffn.router.group_score=2"
"""The score of a group as transformers always computes it."""


@pytest.fixture(scope="session")
def model(lab: Lab) -> LanguageModel:
    """The small model in evaluation mode."""
    return build(lab.recipe("precision.name=fp64", f"model.rope.max_length={LONGEST}")).eval()


@pytest.fixture(scope="session")
def exported(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained run that transformers has an architecture for, and its export in the run's own format."""
    folder = tmp_path_factory.mktemp("exported")
    lab.fit(folder / "run", GROUPS, "budget.steps=60")
    result = lab.command("convert", "to-hf", folder / "run", folder / "hf", "--dtype", "fp32")
    assert result.code == 0, result.err
    return folder / "run", folder / "hf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` caches goes away with the test; it read its environment as it was imported."""
    datasets = pytest.importorskip("datasets", reason="comes with the extra eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer(finished: Path) -> Tokenizer:
    """The tokenizer of the small run, with 300 entries."""
    return Tokenizer.load(finished / "tokenizer.json")
