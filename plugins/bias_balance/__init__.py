"""Auxiliary-loss-free balancing by a selection bias."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.balancer("bias", "plugins.bias_balance.balancer:Bias")
