"""Plain values of a section: the types that a schema allows, conversion by OmegaConf, and words for error messages."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from core.contracts.schema import REQUIRED


def convert(schema: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Plain values as the types of a schema; OmegaConf raises an exception of its own for what it cannot convert."""
    merged: Any = OmegaConf.merge(_structured(schema), values)
    nodes = {key: merged[key] for key in values}
    return {key: OmegaConf.to_object(node) if OmegaConf.is_config(node) else node for key, node in nodes.items()}


@cache
def _structured(schema: Any) -> Any:
    """An OmegaConf node with the plain fields of a schema, which knows their types."""
    hints = hints_of(schema)
    plain = [f for f in fields(schema) if "slot" not in f.metadata and not nested_section(hints[f.name], None)]
    typed = [(f.name, hints[f.name], field(default=REQUIRED)) for f in plain]
    return OmegaConf.structured(make_dataclass(schema.__name__, typed, kw_only=True))


@cache
def hints_of(schema: Any) -> dict[str, Any]:
    """The types of a schema's fields, by name."""
    return get_type_hints(schema)


def nested_section(hint: Any, value: Any) -> tuple[Any, str] | None:
    """The dataclass that a field holds where its value is `value`, and its form: one, list or mapping.

    A number or a schedule is a section only where it is given as one; null is none where null is allowed.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return hint, "one"
    if origin in (list, dict) and is_dataclass(arguments[-1]):
        return arguments[-1], "list" if origin is list else "mapping"
    kinds = [a for a in arguments if is_dataclass(a)]
    if origin in (Union, UnionType) and len(kinds) == 1:
        scalars = [a for a in arguments if a not in (kinds[0], type(None))]
        if isinstance(value, Mapping) or not (scalars or value is None):
            return kinds[0], "one"
    return None


def tidy(value: Any, hint: Any) -> Any:
    """Converts 1e6 to a whole number where only those are allowed, and 4 to a float where only those are."""
    kinds = _kinds(hint)
    if isinstance(value, list) and (item := _item(hint)):
        return [tidy(v, item) for v in value]
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)  # OmegaConf does so by itself, but not in a union
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has one of the types of a hint.

    OmegaConf would convert true to 1 and 3 to true, fails on lists in a union, and takes nan as a number; all three
    are refused here.
    """
    kinds = _kinds(hint)
    if Any in kinds:
        return True
    if isinstance(value, list | dict):
        forms = {get_origin(kind) or kind for kind in kinds}
        item = _item(hint)
        fit = item is None or isinstance(value, dict) or all(fits(v, item) for v in value)
        return fit and bool(forms & ({dict} if isinstance(value, dict) else {list, tuple}))
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and bool in kinds:
        return int in kinds or float in kinds
    return not (isinstance(value, float) and math.isnan(value))


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _item(hint: Any) -> Any:
    """The type of a list's items, None where the hint is no list."""
    return next((get_args(kind)[0] for kind in _kinds(hint) if get_origin(kind) is list), None)


def default_of(f: Any) -> Any:
    """The default of a dataclass field; `REQUIRED` if it has none."""
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else REQUIRED


def describe_type(hint: Any) -> str:
    """A type in words, as an error message says what is allowed."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(a) for a in arguments)
    if origin is list:
        return f"a list, each item {describe_type(arguments[0])}"
    if origin is dict:
        return "a section of keys"
    if arguments:
        return "one of " + ", ".join(map(str, arguments))
    if is_dataclass(hint):
        return f"a {getattr(hint, '__name__', '').lower()} (keys: {', '.join(f.name for f in fields(hint))})"
    return str(hint)


def show_value(value: Any) -> str:
    """A value as an error message shows it: in YAML's words, at most 80 characters."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
