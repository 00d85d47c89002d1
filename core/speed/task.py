"""What one row of a measurement is about."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.model.language_model import LanguageModel
from core.speed.shapes import Comparable

OURS = "ours"
THEIRS = "theirs"
LIMIT = "limit"

COMPILED = "compiled"
"""The end of the name of a variant whose first run compiles, and is no sign of its speed."""


@dataclass(frozen=True)
class Task:
    """One model, measured at one place.

    Args:
        measured: the model.
        device: where.
        seconds: the time for its turns, about.
        with_peer: whether transformers takes part.
        trust: whether the recipe may name code of its own.
        fewest: rounds that are measured in any case.
        compiles: whether variants of the peer that compile are measured.
        profile: a folder for a trace of our side; None: no trace.
    """

    measured: Comparable
    device: torch.device
    seconds: float
    with_peer: bool = True
    trust: bool = False
    fewest: int = 8
    compiles: bool = True
    profile: Path | None = None


@dataclass(frozen=True)
class Text:
    """A text that is continued.

    Args:
        rows: sequences that are decoded together.
        context: tokens of each prompt.
        new: tokens that are written after it.
    """

    rows: int
    context: int
    new: int


def size_of(measured: Comparable, model: LanguageModel) -> dict[str, Any]:
    """The sizes of a model that a row names."""
    experts = [layer.experts for layer in model.expert_layers().values()]
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "experts": max(experts, default=0),
        "precision": measured.recipe.precision.name,
    }
