"""Manifold-constrained hyper-connections: a residual of several streams."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the residual of several streams."""
    registry.residual("hyper_connections", "plugins.hyper_connections.residual:HyperConnections")
