"""Two gloo ranks as forked processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.testing.forked_ranks import on_ranks


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """The results of a function on two gloo ranks, each a forked process."""
    return on_ranks(work, folder, world=2)
