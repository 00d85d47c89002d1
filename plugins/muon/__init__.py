"""Muon."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.optimizer("muon", "plugins.muon.optimizer:MuonWithAdamW")
