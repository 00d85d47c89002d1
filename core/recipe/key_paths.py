"""Key paths of a resolved recipe, and the recipe as plain containers."""

from dataclasses import fields, is_dataclass
from typing import Any

from core.contracts.schema import Section


def to_dict(value: Any) -> Any:
    """Converts a resolved recipe to plain containers, as `recipe.yaml` holds them; resolving them gives it again."""
    if isinstance(value, Section):
        return {"name": value.name, **to_dict(value.config)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_dict(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in fields(value)}
    return value


def value_at(value: Any, path: str) -> Any:
    """The value at a key path of an instance; an empty mapping for sections, which no error message shows."""
    parts = path.split(".") if path else []
    for part in parts:
        if isinstance(value, Section) and not hasattr(value, part):
            value = value.config
        if isinstance(value, list):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
        else:
            value = getattr(value, part, None)
    first = value[0] if isinstance(value, list) and value else value
    if is_dataclass(first) or isinstance(first, dict):
        return {}
    return value


def join_keys(path: str, key: str) -> str:
    """The path of a key inside the section at `path`; either may be empty."""
    if path and key:
        return f"{path}.{key}"
    return path or key
