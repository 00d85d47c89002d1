"""Paths in a recipe that are relative to its own file, so that a converted run may be moved with what it names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.recipe.recipe_layers import COMMAND_LINE, Layers

OWN_PATHS = (("initial_weights",), ("initial_weights", "path"))
"""Keys of paths that are relative to the file which names them, if they begin with a dot."""


def locate_own_paths(layers: Layers, ending: str) -> None:
    """Replaces the paths that begin with a dot by whole paths; those of the command line stay as they are.

    Args:
        layers: the layers of a recipe.
        ending: what the origin of a key may have after the name of its file.
    """
    for keys in OWN_PATHS:
        section: Any = layers.values
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        value = section.get(keys[-1]) if isinstance(section, dict) else None
        origin = layers.origin(".".join(keys))
        if not isinstance(value, str) or not value.startswith("."):
            continue
        if not origin.startswith(COMMAND_LINE):
            folder = Path(origin.removesuffix(ending)).parent
            layers.values = _replaced(layers.values, keys, os.path.abspath(folder / value))


def _replaced(values: dict[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested mappings with another value at the end of a key path that exists."""
    if len(keys) == 1:
        return {**values, keys[0]: value}
    return {**values, keys[0]: _replaced(values[keys[0]], keys[1:], value)}
