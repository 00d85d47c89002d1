"""Multi-head, grouped-query and multi-query attention: the baselines of the attention slot."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.attention("mha", "plugins.multi_head.attention:MultiHeadAttention")
    registry.attention("gqa", "plugins.multi_head.attention:GroupedQueryAttention")
    registry.attention("mqa", "plugins.multi_head.attention:MultiQueryAttention")
