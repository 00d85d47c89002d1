"""DeepSeek-V3 routing."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.router("deepseek_v3", "plugins.deepseek_routing.router:DeepSeekV3Router")
