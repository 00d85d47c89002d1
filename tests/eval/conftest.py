"""A small model in fp64 with its initial weights, which reads 24 tokens, and the small run's tokenizer."""

from pathlib import Path

import pytest
from lab import Lab

from core.assemble import build
from core.data.tokenizer import Tokenizer
from core.model.language_model import LanguageModel

LONGEST = 24


@pytest.fixture(scope="session")
def model(lab: Lab) -> LanguageModel:
    """In evaluation mode."""
    return build(lab.recipe("precision.name=fp64", f"model.rope.max_length={LONGEST}")).eval()


@pytest.fixture(scope="session")
def tokenizer(finished: Path) -> Tokenizer:
    """300 entries."""
    return Tokenizer.load(finished / "tokenizer.json")
