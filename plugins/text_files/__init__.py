"""Corpus `files`: text files of your own."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the corpus."""
    registry.corpus("files", "plugins.text_files.corpus:TextFiles")
