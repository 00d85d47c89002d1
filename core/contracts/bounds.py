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


def not_negative(config: Any, *keys: str) -> None:
    """Raises `ConfigError` unless the values of some keys are at least 0 and finite."""
    for key in keys:
        if not 0 <= getattr(config, key) < math.inf:
            raise ConfigError(key, "must be at least 0 and finite")


def fraction(config: Any, *keys: str) -> None:
    """Raises `ConfigError` unless the values of some keys are at least 0 and less than 1."""
    for key in keys:
        if not 0 <= getattr(config, key) < 1:
            raise ConfigError(key, "must be at least 0 and less than 1")


def positive(config: Any, *keys: str) -> None:
    """Raises `ConfigError` unless the values of some keys are more than 0 and finite."""
    for key in keys:
        if not 0 < getattr(config, key) < math.inf:
            raise ConfigError(key, "must be more than 0 and finite")
