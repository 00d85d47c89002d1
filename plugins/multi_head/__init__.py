"""Multi-head, grouped-query and multi-query attention: the baselines of the attention slot."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.attention("mha", "plugins.multi_head.attention:MultiHeadAttention")
    registry.attention("gqa", "plugins.multi_head.attention:GroupedQueryAttention")
    registry.attention("mqa", "plugins.multi_head.attention:MultiQueryAttention")
