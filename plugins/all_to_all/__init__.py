"""Dispatch to experts that are divided over ranks."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.dispatcher("all_to_all", "plugins.all_to_all.dispatcher:AllToAllDispatcher")
