"""Corpus `mixture`: several corpora with weights."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the corpus."""
    registry.corpus("mixture", "plugins.mixture.corpus:Mixture")
