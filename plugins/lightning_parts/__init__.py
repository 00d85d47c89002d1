"""Strategies and loggers that Lightning already has."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offer the components of this package."""
    registry.strategy("single", "plugins.lightning_parts.strategies:Single")
    registry.strategy("ddp", "plugins.lightning_parts.strategies:DataParallel")
    registry.logger("csv", "plugins.lightning_parts.loggers:CSV")
    registry.logger("tensorboard", "plugins.lightning_parts.loggers:TensorBoard")
