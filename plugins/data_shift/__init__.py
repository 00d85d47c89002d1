"""Corpus `shift`: one corpus until some fraction of the run, another one after it."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the corpus."""
    registry.corpus("shift", "plugins.data_shift.corpus:DataShift")
