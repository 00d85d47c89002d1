"""Corpus `tokens`: files of token ids that another program has written."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the corpus."""
    registry.corpus("tokens", "plugins.tokens.corpus:Tokens")
