"""Corpus `package_text`: text that an installed Python package ships."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the corpus."""
    registry.corpus("package_text", "plugins.package_text.corpus:PackageText")
