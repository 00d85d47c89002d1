"""Early stopping, statistics of the GPU, and any callback that Lightning or a plugin's package has."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.callback("early_stopping", "plugins.callbacks.factories:EarlyStopping")
    registry.callback("gpu_stats", "plugins.callbacks.factories:GpuStatistics")
    registry.callback("lightning", "plugins.callbacks.lightning_callback:LightningCallback")
