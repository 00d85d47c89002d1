"""An exponential moving average of the weights, beside those that are trained."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.callback("ema", "plugins.ema.factory:ExponentialMovingAverage")
