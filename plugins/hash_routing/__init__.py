"""Hash layers: a token's id decides."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.router("hash", "plugins.hash_routing.router:HashRouter")
