"""Cosine routing for moeloom."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the router."""
    registry.router("cosine", "moeloom_cosine_router.router:CosineRouter")
