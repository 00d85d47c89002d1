"""The router z-loss of ST-MoE."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.balancer("z_loss", "plugins.z_loss.balancer:ZLoss")
