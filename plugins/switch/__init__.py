"""Switch Transformer: top-1 with capacity, and its balance loss."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.router("switch", "plugins.switch.router:SwitchRouter")
    registry.balancer("switch", "plugins.switch.balancer:SwitchLoss")
