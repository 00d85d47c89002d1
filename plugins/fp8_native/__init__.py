"""FP8 products by torch's own `scaled_mm`."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.precision("fp8_native", "plugins.fp8_native.precision:NativeFP8")
