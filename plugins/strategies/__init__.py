"""Strategies: one device, and several that hold the whole model or divide it."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.strategy("single", "plugins.strategies.data_parallel:Single")
    registry.strategy("ddp", "plugins.strategies.data_parallel:DataParallel")
    registry.strategy("fsdp", "plugins.strategies.sharded:FullyShardedDataParallel")
    registry.strategy("expert_parallel", "plugins.strategies.sharded:ExpertParallel")
    registry.strategy("pipeline", "plugins.strategies.pipeline:Pipeline")
