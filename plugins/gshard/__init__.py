"""GShard: top-2 with capacity, its dropless form, and its balance loss."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.router("gshard", "plugins.gshard.router:GShardRouter")
    registry.router("gshard_dropless", "plugins.gshard.router:DroplessRouter")
    registry.balancer("gshard", "plugins.gshard.balancer:GShardLoss")
