"""Corpus `files`: text files of your own."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the corpus."""
    registry.corpus("files", "plugins.text_files.corpus:TextFiles")
