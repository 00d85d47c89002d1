"""The layers of a recipe, merged into one mapping that remembers where each key was set.

A layer is a mapping from a file, or the overrides of the command line. It is merged over the layers before it: mappings
key by key, everything else whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.contracts.errors import ConfigError, UserError
from core.recipe.recipe_schema import RecipeSchema
from core.recipe.values import omegaconf_message
from core.storage.documents import is_text

BUDGETS = frozenset({"steps", "tokens", "flops"})
COMMAND_LINE = "command line"


class Layers:
    """The merged values of a recipe's layers, with the origin of each key.

    `inherited` holds, for each section whose `name` a later layer changed, the keys that only the earlier layer set:
    they belonged to another component.

    Args:
        file: the recipe's file, the origin of every key that no layer sets.
    """

    def __init__(self, file: str) -> None:
        self.values: dict[str, Any] = {}
        self.inherited: dict[str, set[str]] = {}
        self._origins: dict[str, str] = {}
        self._layer_of: dict[str, int] = {}
        self._file = file

    def add(self, layer: dict[str, Any], origin: str) -> None:
        """Merges a mapping over the values so far; lists are replaced whole."""
        self._replace(_merged(self.values, layer), dict.fromkeys(_key_paths(layer), origin))

    def override(self, texts: Iterable[str]) -> None:
        """Merges `KEY.PATH=VALUE` each over the values; together they are one layer, whatever their order."""
        values = self.values
        before = set(_key_paths(self.values))
        origins: dict[str, str] = {}
        for text in texts:
            key, value = _parse_override(text)
            try:
                values = _with_value(_with_defaults(RecipeSchema, values, key), key, value)
            except ConfigError as error:
                raise UserError(f"{COMMAND_LINE}: {text!r}: {error.why}") from error
            path = ".".join(key)
            changed = [path]
            for enclosing in _key_paths(values):
                if enclosing not in before and path.startswith(f"{enclosing}."):
                    changed.append(enclosing)
            changed += [f"{path}.{below}" for below in _key_paths(value)]
            origins |= dict.fromkeys(changed, f"{COMMAND_LINE} ({text})")
        self._replace(values, origins)

    def origin(self, path: str) -> str:
        """Returns the file or the override in which the nearest enclosing key was set."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            enclosing = ".".join(parts[:end])
            if enclosing in self._origins:
                return self._origins[enclosing]
        return self._file

    def is_before(self, path: str, other: str) -> bool:
        """Whether the layer that set a key was merged before the one that set another."""
        first = self._layer_of.get(self.origin(path), 0)
        return first < self._layer_of.get(self.origin(other), 0)

    def _replace(self, merged: Any, origins: dict[str, str]) -> None:
        """Takes the merged values and the origins of the keys that the new layer set."""
        self._layer_of |= dict.fromkeys(origins.values(), len(self._layer_of))
        explicit: dict[str, set[str]] = {}
        for path in origins:
            section, _, key = path.rpartition(".")
            explicit.setdefault(section, set()).add(key)
            self.inherited.get(section, set()).discard(key)
        for path, keys in _renamed_sections(self.values, merged, ""):
            left = keys - explicit.get(path, set()) - {"name"}
            self.inherited.setdefault(path, set()).update(left)
        self.values = _with_one_budget(merged, explicit.get("budget", set()))
        known = self._origins | origins
        self._origins = {path: known[path] for path in _key_paths(self.values) if path in known}


def _with_one_budget(values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The values in which a later layer's budget replaces that of an earlier layer, whatever its unit."""
    budget = values.get("budget")
    if not isinstance(budget, dict) or all(budget.get(key) is None for key in given):
        return values
    kept = {key: value for key, value in budget.items() if key in given or key not in BUDGETS}
    return {**values, "budget": kept}


def _parse_override(text: str) -> tuple[list[str], Any]:
    """The key path and the value of one override."""
    key, equals, written = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"{COMMAND_LINE}: {text!r}: an override must have the form KEY.PATH=VALUE")
    if not is_text(text):
        raise UserError(f"{COMMAND_LINE}: {text!r}: holds bytes that are not UTF-8")
    if path == ["extends"]:
        raise UserError(f"{COMMAND_LINE}: {text!r}: only a file can extend another")
    try:
        held = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={written}"]))
    except RecursionError as cause:
        why = "the value is nested too deep"
        raise UserError(f"{COMMAND_LINE}: {text[:60]!r}...: {why}") from cause
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as cause:
        why = omegaconf_message(cause)
        if isinstance(cause, yaml.MarkedYAMLError):
            why = str(cause.problem)
        raise UserError(f"{COMMAND_LINE}: {text!r}: the value cannot be read: {why}") from cause
    assert isinstance(held, dict)
    return path, with_string_keys(held["value"])


def with_string_keys(value: Any) -> Any:
    """Converts the keys of all mappings to strings, because a block may be called 1."""
    if isinstance(value, dict):
        return {str(key): with_string_keys(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_string_keys(item) for item in value]
    return value


def _merged(below: Any, above: Any) -> Any:
    """One value merged over another: mappings key by key, everything else whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = dict(below)
    for key, item in above.items():
        merged[key] = _merged(below.get(key), item)
    return merged


def _with_value(below: Any, path: list[str], value: Any, done: str = "") -> Any:
    """A copy of `below` with a value merged over the one at a key path.

    Raises:
        ConfigError: the path leads into something that has no keys, or past the end of a list.
    """
    if not path:
        return _merged(below, value)
    key = path[0]
    rest = path[1:]
    where = _below(done, key)
    if isinstance(below, list):
        if not key.isdecimal() or int(key) >= len(below):
            why = f"{done} has {len(below)} items, numbered from 0, and no {key!r}"
            raise ConfigError(where, why)
        items = list(below)
        items[int(key)] = _with_value(below[int(key)], rest, value, where)
        return items
    if not isinstance(below, dict | None):
        raise ConfigError(where, f"{done} = {below!r} has no keys")
    section = below or {}
    return {**section, key: _with_value(section.get(key), rest, value, where)}


def _with_defaults(schema: Any, values: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The values with the default list or mapping of components that a key path leads into, if none is given."""
    key = path[0]
    rest = path[1:]
    f = schema.__dataclass_fields__.get(key)
    if f is None or not rest:
        return values
    if f.metadata.get("many", "one") != "one":
        if key in values:
            return values
        return {**values, key: f.default_factory()}
    inner = values.get(key, {})
    if is_dataclass(f.type) and isinstance(inner, dict):
        return {**values, key: _with_defaults(f.type, inner, rest)}
    return values


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the key path and the value of everything that is neither a mapping nor a list."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    for key, item in _items(value):
        yield from leaves(item, _below(path, key))


def _key_paths(value: Any, path: str = "") -> Iterator[str]:
    """Yields the path of every key and of every list item."""
    for key, item in _items(value):
        where = _below(path, key)
        yield where
        yield from _key_paths(item, where)


def _renamed_sections(before: Any, after: Any, path: str) -> Iterator[tuple[str, set[str]]]:
    """Yields the sections whose `name` changed, with the keys that they had before."""
    if isinstance(before, dict) and isinstance(after, dict):
        if "name" in after and before.get("name") != after["name"]:
            yield path, set(before)
        pairs = [(key, before[key], after[key]) for key in before if key in after]
    elif isinstance(before, list) and isinstance(after, list):
        pairs = [(str(i), b, a) for i, (b, a) in enumerate(zip(before, after, strict=False))]
    else:
        return
    for key, old, new in pairs:
        yield from _renamed_sections(old, new, _below(path, key))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """The keys and items of a mapping, the numbers and items of a list; nothing for a plain value."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, list):
        return enumerate(value)
    return ()


def _below(path: str, key: Any) -> str:
    """The path of a key inside the section at `path`."""
    return f"{path}.{key}" if path else str(key)
