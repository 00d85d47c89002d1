"""A profile of a few steps of a run."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.callback("profiler", "plugins.profiler.factory:Profiler")
