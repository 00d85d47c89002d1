"""Corpus `package_text`: text that an installed Python package ships."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the corpus."""
    registry.corpus("package_text", "plugins.package_text.corpus:PackageText")
