"""Quantile Balancing: a selection bias solved for from the scores of the whole step."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.balancer("quantile", "plugins.quantile.balancer:QuantileBalance")
