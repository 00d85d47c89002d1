"""From plain containers to validated dataclasses, section by section.

A section with a `name` has the schema of whoever owns that name, so each is read in three moves: take the
name, ask the registry for the component, hold the other keys against its `Config`. OmegaConf checks and
converts the plain values; this module adds where the mistake stands and what would have been right.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.contracts.errors import UserError, Wrong, nearest
from core.contracts.schema import REQUIRED, Section
from core.extension.registry import Registry


class Resolver:
    """Reads one composed recipe.

    Args:
        registry: who owns which name.
        origin: the file or the command line that a key path was set in.
        inherited: keys that stand in a section only because it replaced another one's `name`; they are
            dropped where the new schema does not know them.
        components: False reads the core's own keys only and imports no component.
    """

    def __init__(
        self,
        registry: Registry,
        origin: Callable[[str], str],
        inherited: Mapping[str, set[str]],
        *,
        components: bool = True,
    ) -> None:
        self.registry, self.origin, self.inherited, self.components = registry, origin, inherited, components
        self.dropped: list[str] = []

    def section(self, schema: Any, raw: Any, path: str, parent: Any = None) -> Any:
        """An instance of `schema` with the values of `raw`, children resolved, checks passed."""
        if not isinstance(raw, Mapping):
            raise self.error(path, raw, f"must be a section of keys: {', '.join(f.name for f in fields(schema))}")
        values = self._known(schema, raw, path)
        instance = self._plain(schema, values, path)
        hints = _hints(schema)
        for f in fields(schema):
            value = values.get(f.name, _default(f))
            where = _join(path, f.name)
            if "slot" in f.metadata:
                setattr(instance, f.name, self._children(f.metadata, value, where, instance))
            elif (nested := _nested(hints[f.name])) and value is not None:
                kind, many = nested
                if many:
                    value = self._mapping(value, where)
                    resolved: Any = {key: self.section(kind, v, _join(where, key), instance) for key, v in value.items()}
                else:
                    resolved = self.section(kind, value, where, instance)
                setattr(instance, f.name, resolved)
        self._check(instance, raw, path, parent)
        return instance

    def error(self, path: str, value: Any, why: str) -> UserError:
        """One sentence: file, key path, value, what is allowed."""
        shown = "" if isinstance(value, Mapping) else f" = {_show(value)}"
        return UserError(f"{self.origin(path)}: {path}{shown}: {why}")

    def _known(self, schema: Any, raw: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The raw values whose keys the schema has; every required one present."""
        names = [f.name for f in fields(schema)]
        values = {}
        for key, value in raw.items():
            if key in names:
                values[key] = value
            elif key in self.inherited.get(path, ()):
                self.dropped.append(_join(path, key))
            else:
                where = _join(path, str(key))
                raise UserError(f"{self.origin(where)}: {where}: unknown key; {nearest(str(key), names)}")
        for f in fields(schema):
            if _default(f) == REQUIRED and values.get(f.name, REQUIRED) == REQUIRED:
                doc = f.metadata.get("doc", "")
                raise UserError(f"{self.origin(path)}: {_join(path, f.name)}: required key is missing ({doc})")
        return values

    def _plain(self, schema: Any, values: Mapping[str, Any], path: str) -> Any:
        """The instance, its plain values checked and converted by OmegaConf; sections are left for later."""
        base, hints = _structured(schema), _hints(schema)
        plain: dict[str, Any] = {}
        for f in fields(schema):
            if "slot" in f.metadata or _nested(hints[f.name]):
                plain[f.name] = None
            elif f.name in values:
                plain[f.name] = self._value(base, f.name, hints[f.name], values[f.name], _join(path, f.name))
        return schema(**plain)

    def _value(self, base: Any, key: str, hint: Any, value: Any, path: str) -> Any:
        if isinstance(value, float) and value.is_integer() and int in (hint, *get_args(hint)):
            value = int(value)  # 1e6 for a count of tokens
        if isinstance(value, bool) and bool not in (hint, *get_args(hint)) and hint is not Any:
            raise self.error(path, value, f"must be {_describe(hint)}")
        try:
            merged = OmegaConf.merge(base, {key: value})
            converted = merged[key]
            return OmegaConf.to_object(converted) if OmegaConf.is_config(converted) else converted
        except OmegaConfBaseException as cause:
            detail = f" ({str(cause).splitlines()[0]})" if isinstance(value, Mapping | list) else ""
            raise self.error(path, value, f"must be {_describe(hint)}{detail}") from cause

    def _children(self, metadata: Mapping[str, Any], value: Any, path: str, parent: Any) -> Any:
        if metadata["many"] == "list":
            if not isinstance(value, list):
                raise self.error(path, value, f"must be a list of {metadata['slot']} sections")
            return [self.component(metadata["slot"], v, f"{path}.{i}", parent) for i, v in enumerate(value)]
        if metadata["many"] == "mapping":
            items = self._mapping(value, path).items()
            return {key: self.component(metadata["slot"], v, _join(path, key), parent) for key, v in items}
        return None if value is None else self.component(metadata["slot"], value, path, parent)

    def component(self, slot: str, raw: Any, path: str, parent: Any) -> Section | None:
        """The section of a component: `{name: ..., its own keys}`."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
            known = ", ".join(self.registry.names(slot))
            raise self.error(path, raw, f"must be a section with a `name` ({slot}: {known})")
        if not self.components:
            return None
        try:
            component, provenance = self.registry.find(slot, raw["name"]).load()
        except UserError as cause:
            raise UserError(f"{self.origin(_join(path, 'name'))}: {_join(path, 'name')}: {cause}") from cause
        rest = {key: value for key, value in raw.items() if key != "name"}
        config = self.section(component.Config, rest, path, parent)
        return Section(slot, raw["name"], component, config, provenance)

    def _mapping(self, value: Any, path: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(path, value, "must map names to sections")
        return value

    def _check(self, instance: Any, raw: Mapping[str, Any], path: str, parent: Any) -> None:
        if not hasattr(instance, "check"):
            return
        try:
            instance.check(parent)
        except Wrong as wrong:
            value = instance
            for part in wrong.key.split("."):
                value = getattr(value, part, None)
            plain = {} if is_dataclass(value) or isinstance(value, Section | dict) else value
            raise self.error(_join(path, wrong.key), plain, wrong.why) from wrong


def to_dict(value: Any) -> Any:
    """Plain containers of a resolved recipe: what `recipe.yaml` holds; resolving them again gives the same."""
    if isinstance(value, Section):
        return {"name": value.name, **to_dict(value.config)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_dict(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in fields(value)}
    return value


@cache
def _structured(schema: Any) -> Any:
    """An OmegaConf node with the plain fields of a schema, which knows their types."""
    hints = _hints(schema)
    plain = [f for f in fields(schema) if "slot" not in f.metadata and not _nested(hints[f.name])]
    typed = [(f.name, hints[f.name], field(default=REQUIRED)) for f in plain]
    return OmegaConf.structured(make_dataclass(schema.__name__, typed, kw_only=True))


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _nested(hint: Any) -> tuple[Any, bool] | None:
    """The core section that a field holds, and whether it holds a mapping of them."""
    if is_dataclass(hint):
        return hint, False
    if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
        return get_args(hint)[1], True
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    if get_origin(hint) in (Union, UnionType) and len(inner) == 1 and is_dataclass(inner[0]):
        return inner[0], False
    return None


def _default(f: Any) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else REQUIRED


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin is list:
        return f"a list, each item {_describe(arguments[0])}"
    if origin is dict:
        return "a section of keys"
    if arguments:
        return "one of " + ", ".join(map(str, arguments))
    return "a schedule" if getattr(hint, "__name__", "") == "Schedule" else str(hint)


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return repr(value) if isinstance(value, str) else str(value)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
