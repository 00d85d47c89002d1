"""Dispatch within one device."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.dispatcher("local", "plugins.local_dispatch.dispatcher:LocalDispatcher")
