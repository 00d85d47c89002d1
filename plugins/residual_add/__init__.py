"""The plain residual stream."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the residual stream to which outputs are added."""
    registry.residual("add", "plugins.residual_add.residual:AddResidual")
