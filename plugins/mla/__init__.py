"""Multi-head Latent Attention."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.attention("mla", "plugins.mla.attention:LatentAttention")
