"""Loggers that Lightning already has: two that write files of their own, two that need a further package."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.logger("csv", "plugins.loggers.lightning_loggers:CSV")
    registry.logger("tensorboard", "plugins.loggers.lightning_loggers:TensorBoard")
    registry.logger("wandb", "plugins.loggers.tracking:WeightsAndBiases")
    registry.logger("mlflow", "plugins.loggers.tracking:MLflow")
