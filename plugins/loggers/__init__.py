"""Loggers that Lightning already has."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.logger("csv", "plugins.loggers.lightning_loggers:CSV")
    registry.logger("tensorboard", "plugins.loggers.lightning_loggers:TensorBoard")
