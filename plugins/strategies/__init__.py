"""Strategies that Lightning already has."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.strategy("single", "plugins.strategies.data_parallel:Single")
    registry.strategy("ddp", "plugins.strategies.data_parallel:DataParallel")
