"""FP8 training as DeepSeek-V3 does it, emulated in fp32 on any machine."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.precision("fp8_emulated", "plugins.fp8_emulated.precision:EmulatedFP8")
