"""Next-token prediction."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.loss_head("next_token", "plugins.next_token.head:NextToken")
