"""DeepSeek Sparse Attention."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.attention("sparse", "plugins.sparse.attention:SparseAttention")
