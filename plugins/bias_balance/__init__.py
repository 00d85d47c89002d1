"""Auxiliary-loss-free balancing by a selection bias."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.balancer("bias", "plugins.bias_balance.balancer:Bias")
