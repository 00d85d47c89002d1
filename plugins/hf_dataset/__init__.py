"""Corpus `hf_dataset`: data sets of the library `datasets`."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the corpus."""
    registry.corpus("hf_dataset", "plugins.hf_dataset.corpus:HfDataset")
