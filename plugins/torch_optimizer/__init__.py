"""Any optimizer of torch.optim, by name."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.optimizer("torch", "plugins.torch_optimizer.optimizer:TorchOptimizer")
