"""Corpora `files` and `chat`: text and conversations in files of your own."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the corpora."""
    registry.corpus("files", "plugins.text_files.corpus:TextFiles")
    registry.corpus("chat", "plugins.text_files.chat:Chat")
