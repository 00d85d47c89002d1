"""Experts in turn, for speed measurements."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.router("forced_balance", "plugins.forced_balance.router:ForcedBalanceRouter")
