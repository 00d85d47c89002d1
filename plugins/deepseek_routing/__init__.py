"""DeepSeek-V3 routing."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offer the components of this package."""
    registry.router("deepseek_v3", "plugins.deepseek_routing.router:DeepSeekV3Router")
