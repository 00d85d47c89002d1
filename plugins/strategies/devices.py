"""What the strategies share: checks of devices, machines and batches, and the Trainer's arguments for devices."""

from datetime import timedelta
from typing import Any

from core.contracts.component import Environment
from core.contracts.errors import ConfigError

TIMEOUT = 30.0
"""Default of `timeout_minutes`."""

TIMEOUT_DOC = "minutes that ranks wait for one that is late, before the run ends"
"""What the reference says about `timeout_minutes`."""


def missing_gpu(config: Any, environment: Environment) -> str | None:
    """Why a run cannot start, as a sentence: `accelerator` is cuda, and there is no GPU; else None."""
    if config.accelerator == "cuda" and environment.device != "cuda":
        return "accelerator is cuda, and torch finds no GPU"
    return None


def check_nodes(nodes: int, ranks: int) -> None:
    """Raises `ConfigError` if the ranks cannot be shared equally by the nodes."""
    if nodes < 1 or ranks % nodes:
        raise ConfigError("nodes", f"must be at least 1, and divide ranks = {ranks}")


def check_timeout(minutes: float) -> None:
    """Raises `ConfigError` if collectives would wait for no time, or for ever."""
    if not 0 < minutes < float("inf"):
        raise ConfigError("timeout_minutes", "must be greater than 0")


def timeout_of(config: Any) -> timedelta:
    """How long a collective waits for a rank."""
    return timedelta(minutes=config.timeout_minutes)


def device_arguments(accelerator: str, *, ranks: int, nodes: int) -> dict[str, Any]:
    """The Trainer's arguments that choose the devices: their kind, how many on each node, and how many nodes."""
    return {"accelerator": accelerator, "devices": ranks // nodes, "num_nodes": nodes}


def check_share(recipe: Any, key: str, ranks: int) -> None:
    """Raises `ConfigError` if ranks cannot share a micro-batch, or one of validation, evenly.

    Args:
        recipe: the recipe, or something without these sections.
        key: the key that says how many ranks there are.
        ranks: how many there are.
    """
    for name in ("batch", "validation"):
        section = getattr(recipe, name, None)
        sequences = ranks if section is None else section.sequences
        if ranks < 1 or sequences % ranks:
            raise ConfigError(key, f"must divide {name}.sequences = {sequences}")
