"""Bounds of numbers in a section, for its `check`."""

import math
from typing import Any

from core.contracts.errors import ConfigError


def at_least(config: Any, low: int, *keys: str) -> None:
    """Raises `ConfigError` unless the values of some keys are null, or numbers from `low` on and finite."""
    for key in keys:
        value = getattr(config, key)
        if value is None or low <= value < math.inf:
            continue
        if value == math.inf:
            raise ConfigError(key, "must be finite")
        raise ConfigError(key, f"must be at least {low}")


def positive(config: Any, *keys: str) -> None:
    """Raises `ConfigError` unless the values of some keys are more than 0 and finite."""
    for key in keys:
        if not 0 < getattr(config, key) < math.inf:
            raise ConfigError(key, "must be more than 0")
