"""Experts in turn, for speed measurements."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.router("forced_balance", "plugins.forced_balance.router:ForcedBalanceRouter")
