"""Plain values of a section: the types that a schema allows, conversion by OmegaConf, and texts for error messages."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from core.contracts.errors import ConfigError
from core.contracts.schema import REQUIRED

HARMLESS_RESOLVERS = frozenset(
    {"oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.select"}
)
"""OmegaConf's own resolvers that read nothing but the file's values."""


def convert(schema: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Converts plain values to the types of a schema; OmegaConf raises its own exception if it cannot.

    Raises:
        ConfigError: a value reads the environment.
    """
    converted: dict[str, Any] = {}
    with environment_hidden() as attempts:
        merged: Any = OmegaConf.merge(_structured(schema), values)
        for key in values:
            try:
                node = merged[key]
                converted[key] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
            except OmegaConfBaseException as cause:
                if attempts:
                    raise ConfigError(key, attempts[0]) from cause
                raise
    return converted


@contextmanager
def environment_hidden() -> Iterator[list[str]]:
    """A context in which `${...}` reads the values of the file itself, and nothing of the machine.

    Of OmegaConf's resolvers, `oc.env` is an error here: what it reads would be written into `recipe.yaml` and into
    reports. `oc.coerce`, which imports modules, and the resolvers of other packages are unknown here.

    Yields:
        The sentences about `oc.env`, one for each attempt to use it.
    """
    attempts: list[str] = []

    def refuse(config: Any, parent: Any, node: Any, arguments: Any, texts: Any) -> None:
        name = texts[0] if texts else ""
        attempts.append(
            f"${{oc.env:{name}}} reads the environment, which a recipe may not do; "
            "give the value itself, as KEY=VALUE on the command line"
        )
        raise PermissionError(attempts[-1])

    everything = BaseContainer._resolvers
    known = {name: everything[name] for name in HARMLESS_RESOLVERS if name in everything}
    known["oc.env"] = refuse
    BaseContainer._resolvers = known
    try:
        yield attempts
    finally:
        BaseContainer._resolvers = everything


@cache
def _structured(schema: Any) -> Any:
    """An OmegaConf node with the plain fields of a schema and their types."""
    hints = hints_of(schema)
    typed: list[Any] = []
    for f in fields(schema):
        if "slot" not in f.metadata and not nested_section(hints[f.name], None):
            typed.append((f.name, hints[f.name], field(default=REQUIRED)))
    return OmegaConf.structured(make_dataclass(schema.__name__, typed, kw_only=True))


@cache
def hints_of(schema: Any) -> dict[str, Any]:
    """Returns the types of a schema's fields, by name."""
    return get_type_hints(schema)


def nested_section(hint: Any, value: Any) -> tuple[Any, str] | None:
    """Returns the dataclass that a field of this type holds, and its form: one, list or mapping; None without one.

    Whether a field holds a section can depend on its value: a number or a schedule is a section only where it is
    written as one, and null is none where null is allowed.
    """
    origin = get_origin(hint)
    arguments = get_args(hint)
    if is_dataclass(hint):
        return hint, "one"
    if origin in (list, dict) and is_dataclass(arguments[-1]):
        return arguments[-1], "list" if origin is list else "mapping"
    if origin not in (Union, UnionType):
        return None
    sections = [a for a in arguments if is_dataclass(a)]
    if len(sections) != 1:
        return None
    scalars = set(arguments) - {sections[0], type(None)}
    if isinstance(value, Mapping) or not (scalars or value is None):
        return sections[0], "one"
    return None


def tidy(value: Any, hint: Any) -> Any:
    """Converts 1e6 to an int where only whole numbers are allowed, and 4 to a float where only floats are."""
    kinds = _kinds(hint)
    item = _item(hint)
    if isinstance(value, list) and item:
        return [tidy(v, item) for v in value]
    whole_only = int in kinds and float not in kinds
    float_only = float in kinds and int not in kinds
    if isinstance(value, float) and value.is_integer() and whole_only:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and float_only:
        return float(value)  # OmegaConf does so by itself, but not in a union
    text_or_section = str in kinds and any(is_dataclass(kind) for kind in kinds)
    if type(value) in (int, float) and text_or_section and not takes_floats(hint):
        return str(value)  # a folder may be called 17
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has one of the types of a hint.

    OmegaConf would convert true to 1 and 3 to true, fails on lists in a union, and takes nan and inf as numbers; all
    are errors here. No key of any section may be infinite: null stands for "no limit" if there is one.
    """
    if not_finite(value):
        return False
    kinds = _kinds(hint)
    if Any in kinds:
        return True
    forms = {get_origin(kind) or kind for kind in kinds}
    if isinstance(value, dict):
        return dict in forms
    if isinstance(value, list):
        item = _item(hint)
        items_fit = item is None or all(fits(v, item) for v in value)
        return items_fit and bool(forms & {list, tuple})
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and bool in kinds:
        return int in kinds or float in kinds
    return True


def not_finite(value: Any) -> tuple[list[str], float] | None:
    """Returns the keys that lead to the first NaN or infinity in a plain value, and that number; None without one."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ([], value)
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        found = not_finite(item)
        if found:
            keys, number = found
            return [str(key), *keys], number
    return None


def takes_floats(hint: Any) -> bool:
    """Whether a type allows a number with a fraction, by itself or in a list or a section."""
    for kind in _kinds(hint):
        if kind in (float, Any):
            return True
        if any(takes_floats(inner) for inner in get_args(kind) if get_origin(kind) in (list, dict)):
            return True
    return False


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself if it is none."""
    if get_origin(hint) in (Union, UnionType):
        return get_args(hint)
    return (hint,)


def _item(hint: Any) -> Any:
    """The type of a list's items; None where the hint allows no list."""
    for kind in _kinds(hint):
        if get_origin(kind) is list:
            return get_args(kind)[0]
    return None


def default_of(f: Any) -> Any:
    """Returns the default of a dataclass field; `REQUIRED` if it has none."""
    if f.default is not MISSING:
        return f.default
    if f.default_factory is not MISSING:
        return f.default_factory()
    return REQUIRED


def describe_type(hint: Any) -> str:
    """Describes a type as the text in which an error message says what is allowed."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a string",
        type(None): "null",
    }
    if hint in words:
        return words[hint]
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(a) for a in arguments)
    if origin is list:
        return f"a list, each item {describe_type(arguments[0])}"
    if hint is Any:
        return "anything"
    if origin is dict and arguments[1] is not Any:
        return f"a section of keys, each {describe_type(arguments[1])}"
    if origin is dict:
        return "a section of keys"
    if arguments:
        return "one of " + ", ".join(map(str, arguments))
    if is_dataclass(hint):
        kind = getattr(hint, "__name__", "").lower()
        keys = ", ".join(f.name for f in fields(hint))
        return f"a {kind} (keys: {keys})"
    return str(hint)


def show_value(value: Any) -> str:
    """Formats a value for an error message: as in YAML, at most 80 characters."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = repr(value) if isinstance(value, str) else str(value)
    if len(text) > 80:
        return f"{text[:77]}..."
    return text


def omegaconf_message(cause: Exception) -> str:
    """Returns the message of an exception in one line, without the location that OmegaConf adds."""
    location = ("full_key:", "object_type=", "reference_type=")
    lines = [line.strip() for line in str(cause).splitlines()]
    message = " ".join(line for line in lines if not line.startswith(location))
    return message.replace("NoneType", "null")
