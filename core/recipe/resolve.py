"""From plain containers to validated dataclasses, section by section.

A section with a `name` has the schema of whoever owns that name, so each is read in three moves: take the
name, ask the registry for the component, hold the other keys against its `Config`. OmegaConf checks and
converts the plain values; this module adds where the mistake stands and what would have been right.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.contracts.errors import UserError, Wrong, nearest
from core.contracts.schema import REQUIRED, Section
from core.extension.checks import told_where
from core.extension.registry import Entry, Registry


class Resolver:
    """Reads one composed recipe.

    Args:
        registry: who owns which name.
        origin: the file or the command line that a key path was set in.
        inherited: keys that stand in a section only because it replaced another one's `name`; they are
            dropped where the new schema does not know them.
        components: False reads the core's own keys only, and keeps (slot, name, path) of what they ask for in
            `asked` instead of importing it.
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
        self.asked: list[tuple[str, str, str]] = []
        self._whose = ""  # the component whose section is being read

    def section(self, schema: Any, raw: Any, path: str, parent: Any = None, beside: Iterable[str] = ()) -> Any:
        """An instance of `schema` with the values of `raw`, children resolved, checks passed.

        Args:
            schema: a dataclass whose fields are the section's keys.
            raw: the section, as plain containers.
            path: where it stands; "" for the recipe itself.
            parent: the instance around it, for `check`.
            beside: further keys that may stand in the section and are read elsewhere.
        """
        if not isinstance(raw, Mapping):
            raise self.error(path, raw, f"must be a section of keys: {', '.join(f.name for f in fields(schema))}")
        values = self._known(schema, raw, path, beside)
        instance = self._plain(schema, values, path)
        hints = _hints(schema)
        for f in fields(schema):
            value = values.get(f.name, _default(f))
            where = _join(path, f.name)
            if "slot" in f.metadata:
                owner = parent if f.metadata.get("outer") else instance
                setattr(instance, f.name, self._children(f, value, where, owner))
            elif nested := _nested(hints[f.name], value):
                setattr(instance, f.name, self._sections(*nested, value, where, instance))
        self._check(instance, path, parent)
        return instance

    def error(self, path: str, value: Any, why: str) -> UserError:
        """One sentence: file, key path, value, what is allowed."""
        shown = "" if isinstance(value, Mapping) else f" = {_show(value)}"
        return UserError(f"{self.origin(path)}: {path}{shown}: {why}" if path else f"{self.origin(path)}: {why}")

    def _known(self, schema: Any, raw: Mapping[str, Any], path: str, beside: Iterable[str]) -> dict[str, Any]:
        """The raw values whose keys the schema has; every required one present."""
        names = [f.name for f in fields(schema)]
        values = {}
        for key, value in raw.items():
            if key in names:
                values[key] = value
            elif key in self.inherited.get(path, ()):
                self.dropped.append(_join(path, key))
            else:
                where = _join(path, key)
                raise UserError(f"{self.origin(where)}: {where}: unknown key; {nearest(key, [*names, *beside])}")
        for f in fields(schema):
            if _default(f) == REQUIRED and values.get(f.name, REQUIRED) == REQUIRED:
                doc = f" ({f.metadata['doc']})" if "doc" in f.metadata else ""
                by = self.origin(_join(path, "name"))  # a changed name is what asks for other keys
                raise UserError(f"{by}: {_join(path, f.name)}: required key is missing{doc}")
        return values

    def _plain(self, schema: Any, values: Mapping[str, Any], path: str) -> Any:
        """The instance, its plain values checked and converted by OmegaConf; sections are left for later."""
        base, hints = _structured(schema), _hints(schema)
        plain: dict[str, Any] = {}
        for f in fields(schema):
            if "slot" in f.metadata or _nested(hints[f.name], values.get(f.name, _default(f))):
                plain[f.name] = None
            elif f.name in values:
                plain[f.name] = self._value(base, f.name, hints[f.name], values[f.name], _join(path, f.name))
        with self._answer("Config", path):
            return schema(**plain)

    def _value(self, base: Any, key: str, hint: Any, value: Any, path: str) -> Any:
        value = _tidied(value, hint)
        if not _fits(value, hint):
            raise self.error(path, value, f"must be {_describe(hint)}")
        try:
            merged: Any = OmegaConf.merge(base, {key: value})
            converted = merged[key]
            return OmegaConf.to_object(converted) if OmegaConf.is_config(converted) else converted
        except OmegaConfBaseException as cause:
            raise self.error(path, value, f"must be {_describe(hint)}") from cause

    def _sections(self, kind: Any, form: str, value: Any, path: str, parent: Any) -> Any:
        """The core's own sections that a field holds: one, a list or a mapping of them."""
        if form == "list":
            items = self._list(value, path, "sections")
            return [self.section(kind, item, f"{path}.{i}", parent) for i, item in enumerate(items)]
        if form == "mapping":
            entries = self._mapping(value, path).items()
            return {key: self.section(kind, item, _join(path, key), parent) for key, item in entries}
        return self.section(kind, value, path, parent)

    def _children(self, f: Any, value: Any, path: str, parent: Any) -> Any:
        slot, many, default = f.metadata["slot"], f.metadata["many"], _default(f)
        if many == "list":
            items = self._list(value, path, f"{slot} sections")
            return [self.component(slot, item, f"{path}.{i}", parent) for i, item in enumerate(items)]
        if many == "mapping":
            entries = self._mapping(value, path).items()
            return {key: self.component(slot, item, _join(path, key), parent) for key, item in entries}
        if value is None and default is None:
            return None
        if isinstance(value, Mapping) and "name" not in value and isinstance(default, Mapping):
            value = {**default, **value}
        return self.component(slot, value, path, parent)

    def component(self, slot: str, raw: Any, path: str, parent: Any) -> Section | None:
        """The section of a component: `{name: ..., its own keys}`."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
            known = ", ".join(self.registry.names(slot))
            raise self.error(path, raw, f"must be a section with a `name` ({slot}: {known})")
        if not self.components:
            self.asked.append((slot, raw["name"], path))
            return None
        offer = self.find(slot, raw["name"], path)
        with self._told_at(f"{path}.name"):
            component, provenance = offer.load()
        rest = {key: value for key, value in raw.items() if key != "name"}
        for key in rest:
            if key in component.refuses and key not in self.inherited.get(path, ()):
                raise self.error(_join(path, key), rest[key], f"{raw['name']} has no {key}: {component.refuses[key]}")
        outer, self._whose = self._whose, f"{slot} {raw['name']!r} of {provenance.distribution} ({offer.target})"
        try:
            config = self.section(component.Config, rest, path, parent, beside=["name"])
            with self._answer("capabilities_of", path):  # others ask for it, and are not to blame for it
                if not isinstance(able := component.capabilities_of(config), frozenset | set):
                    raise TypeError(f"{able!r} is no frozenset of words")
        finally:
            self._whose = outer
        return Section(slot, raw["name"], component, config, provenance)

    @contextmanager
    def _answer(self, method: str, path: str, config: Any = None) -> Iterator[None]:
        """Around what a component's own code answers: `Wrong` is told at its key, and anything else is its mistake.

        Raises:
            UserError: as above. What the core's own sections raise otherwise is our bug, and stays as it is.
        """
        try:
            try:
                yield
            except Wrong as wrong:
                value = {} if config is None else _reach(config, wrong.key)
                raise self.error(_join(path, wrong.key), value, wrong.why) from wrong
        except UserError:
            raise
        except Exception as cause:
            if not self._whose:
                raise
            why = f"{self._whose} is broken: its {method} raises {told_where(cause)}"
            raise UserError(f"{self.origin(path)}: {path}: {why}") from cause

    def find(self, slot: str, name: str, path: str) -> Entry:
        """The one offer for a name, nothing imported; `path` is where the section that asks for it stands."""
        with self._told_at(f"{path}.name"):
            return self.registry.find(slot, name)

    @contextmanager
    def _told_at(self, path: str) -> Iterator[None]:
        try:
            yield
        except UserError as cause:
            raise UserError(f"{self.origin(path)}: {path}: {cause}") from cause

    def _list(self, value: Any, path: str, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(path, value, f"must be a list of {what}")
        return value

    def _mapping(self, value: Any, path: str) -> Mapping[str, Any]:
        """Sections by name; one that a later layer set to null is taken away."""
        if not isinstance(value, Mapping):
            raise self.error(path, value, "must map names to sections")
        for key in value:
            if not key or "." in key:
                raise UserError(f"{self.origin(path)}: {path}: a name must not be empty or hold a dot, as {key!r} does")
        return {key: item for key, item in value.items() if item is not None}

    def _check(self, instance: Any, path: str, parent: Any) -> None:
        if not hasattr(instance, "check"):
            return
        with self._answer("check", path, instance):
            instance.check(parent)


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
    plain = [f for f in fields(schema) if "slot" not in f.metadata and not _nested(hints[f.name], None)]
    typed = [(f.name, hints[f.name], field(default=REQUIRED)) for f in plain]
    return OmegaConf.structured(make_dataclass(schema.__name__, typed, kw_only=True))


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _nested(hint: Any, value: Any) -> tuple[Any, str] | None:
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


def _tidied(value: Any, hint: Any) -> Any:
    """1e6 where only whole numbers are allowed is one; 4 where only numbers are allowed is one too."""
    kinds = _kinds(hint)
    if isinstance(value, list) and (item := _item(hint)):
        return [_tidied(v, item) for v in value]
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)  # OmegaConf does so by itself, but not in a union
    return value


def _fits(value: Any, hint: Any) -> bool:
    """False for what OmegaConf converts without a word (true to 1, 3 to true), chokes on, or calls a number: nan."""
    kinds = _kinds(hint)
    if Any in kinds:
        return True
    if isinstance(value, list | dict):
        forms = {get_origin(kind) or kind for kind in kinds}
        item = _item(hint)
        fit = item is None or isinstance(value, dict) or all(_fits(v, item) for v in value)
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


def _reach(value: Any, path: str) -> Any:
    """What stands at a key path of an instance; an empty mapping for a whole section, which no sentence shows."""
    for part in path.split(".") if path else ():
        if isinstance(value, Section) and not hasattr(value, part):
            value = value.config
        if isinstance(value, list):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    whole = value[0] if isinstance(value, list) and value else value
    return {} if is_dataclass(whole) or isinstance(whole, dict) else value


def _default(f: Any) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else REQUIRED


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
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
    if is_dataclass(hint):
        return f"a {getattr(hint, '__name__', '').lower()} (keys: {', '.join(f.name for f in fields(hint))})"
    return str(hint)


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key
