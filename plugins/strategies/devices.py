"""What strategies with the keys `ranks`, `nodes` and `accelerator` share."""

from typing import Any

from core.contracts.component import Environment
from core.contracts.errors import ConfigError


def missing_gpu(config: Any, environment: Environment) -> str | None:
    """Why a run cannot start, as a sentence: `accelerator` is cuda, and there is no GPU; else None."""
    if config.accelerator == "cuda" and environment.device != "cuda":
        return "accelerator is cuda, and torch finds no GPU"
    return None


def check_nodes(config: Any) -> None:
    """Raises `ConfigError` if the ranks cannot be shared equally by the nodes."""
    if config.nodes < 1 or config.ranks % config.nodes:
        raise ConfigError("nodes", f"must be at least 1, and divide ranks = {config.ranks}")


def device_arguments(config: Any) -> dict[str, Any]:
    """The Trainer's arguments that choose the devices: their kind, how many on each node, and how many nodes."""
    return {
        "accelerator": config.accelerator,
        "devices": config.ranks // config.nodes,
        "num_nodes": config.nodes,
    }
