"""Experts chosen by a token's id, with learned gates (DeepSeek-V4)."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.router("hash_gated", "plugins.hash_gated.router:HashGatedRouter")
