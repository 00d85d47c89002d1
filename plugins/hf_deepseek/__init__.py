"""Hugging Face checkpoints of DeepSeek-V2, DeepSeek-V3 and DeepSeek-V3.2."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.checkpoint_format("deepseek_v3", "plugins.hf_deepseek.v3:DeepSeekV3")
    registry.checkpoint_format("deepseek_v32", "plugins.hf_deepseek.v32:DeepSeekV32")
    registry.checkpoint_format("deepseek_v2", "plugins.hf_deepseek.v2:DeepSeekV2")
