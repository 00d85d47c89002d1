"""DeepSeek-V3 routing."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.router("deepseek_v3", "plugins.deepseek_v3_router.router:DeepSeekV3Router")
