"""The router z-loss of ST-MoE."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.balancer("z_loss", "plugins.z_loss.balancer:ZLoss")
