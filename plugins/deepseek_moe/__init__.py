"""DeepSeekMoE: shared and fine-grained routed experts."""

from typing import Any

from core.extension.hookspec import hookimpl

CONTRACTS = "1.0"


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.ffn("moe", "plugins.deepseek_moe.ffn:MixtureOfExperts")
