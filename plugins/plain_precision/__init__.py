"""The plain number formats: fp32, fp64, and bf16 with fp32 master weights, real and emulated."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.precision("fp32", "plugins.plain_precision.precision:FP32")
    registry.precision("fp64", "plugins.plain_precision.precision:FP64")
    registry.precision("bf16", "plugins.plain_precision.precision:BF16")
    registry.precision("bf16_emulated", "plugins.plain_precision.precision:BF16Emulated")
