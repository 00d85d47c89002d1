"""Cosine routing for moeloom."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the router."""
    registry.router("cosine", "moeloom_cosine_router.router:CosineRouter")
