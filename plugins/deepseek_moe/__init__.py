"""DeepSeekMoE: shared and fine-grained routed experts."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.ffn("moe", "plugins.deepseek_moe.ffn:MixtureOfExperts")
