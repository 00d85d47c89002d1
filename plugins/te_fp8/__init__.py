"""FP8 products by NVIDIA's Transformer Engine."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.precision("te_fp8", "plugins.te_fp8.precision:TransformerEngineFP8")
