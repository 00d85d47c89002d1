"""Turns plain containers into validated dataclasses, section by section.

The schema of a section with a `name` is the `Config` of the component of that name. Such a section is read in three
steps: take the name, find the component in the registry, check the other keys against its `Config`. OmegaConf checks
and converts the plain values; this module adds the key path and what is allowed there to an error.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from core.contracts.errors import ConfigError, UserError, nearest
from core.contracts.schema import REQUIRED, Section
from core.extension.checks import format_error_at
from core.extension.registry import Entry, Registry
from core.recipe.key_paths import join_keys, value_at
from core.recipe.values import (
    convert,
    default_of,
    describe_type,
    fits,
    hints_of,
    nested_section,
    not_finite,
    show_value,
    takes_floats,
    tidy,
)

SIZED = frozenset({"model", "data", "batch", "validation", "checkpoint", "recompute"})
"""Sections of a recipe whose whole numbers are sizes and counts."""

LARGEST_SIZE = 2**31 - 1
"""The largest size of a dimension."""


class Resolver:
    """Reads one composed recipe.

    Args:
        registry: the components by name.
        origin: returns the file or the override that a key path was set in.
        inherited: keys that remain in a section from before its `name` was changed; those that the new schema does
            not have are dropped.
        defer: whether the sections of components are kept until `read_components`, so that no component is imported
            before; a `check` that runs before finds null in their place.
        check_source: whether the corpus also checks that its text is there, before components that import torch.
    """

    def __init__(
        self,
        registry: Registry,
        origin: Callable[[str], str],
        inherited: Mapping[str, set[str]],
        *,
        defer: bool = False,
        check_source: bool = False,
    ) -> None:
        self.registry = registry
        self.origin = origin
        self.inherited = inherited
        self.dropped: list[str] = []
        self._defer = defer
        self._check_source = check_source
        self._deferred: list[_Deferred] = []
        self._component = ""  # the component whose section is being read

    def section(
        self, schema: Any, raw: Any, path: str, parent: Any = None, beside: Iterable[str] = ()
    ) -> Any:
        """Returns an instance of `schema` with the values of `raw`, children resolved, checks passed.

        Args:
            schema: a dataclass whose fields are the section's keys.
            raw: the section, as plain containers.
            path: its key path; "" for the recipe itself.
            parent: the instance around it, for `check`.
            beside: further keys that the section may contain, which are read elsewhere.
        """
        if not isinstance(raw, Mapping):
            keys = ", ".join(f.name for f in fields(schema))
            raise self.error(path, raw, f"must be a section of keys: {keys}")
        values = self._known(schema, raw, path, beside)
        instance = self._plain(schema, values, path)
        hints = hints_of(schema)
        for f in fields(schema):
            value = values.get(f.name, default_of(f))
            where = join_keys(path, f.name)
            if "slot" in f.metadata:
                owner = parent if f.metadata.get("outer") else instance
                self._read_children(instance, f, value, where, owner)
            elif nested := nested_section(hints[f.name], value):
                setattr(instance, f.name, self._sections(*nested, value, where, instance))
        self._check(instance, path, parent)
        return instance

    def error(self, path: str, value: Any, why: str) -> UserError:
        """Makes an error whose message is one sentence: file, key path, value, what is allowed."""
        origin = self.origin(path)
        if not path:
            return UserError(f"{origin}: {why}")
        if isinstance(value, Mapping):
            return UserError(f"{origin}: {path}: {why}")
        return UserError(f"{origin}: {path} = {show_value(value)}: {why}")

    def _known(
        self, schema: Any, raw: Mapping[str, Any], path: str, beside: Iterable[str]
    ) -> dict[str, Any]:
        """The raw values whose keys the schema has; an unknown or a missing key is an error."""
        names = [f.name for f in fields(schema)]
        values = {}
        for key, value in raw.items():
            if key in names:
                values[key] = value
            elif key in self.inherited.get(path, ()):
                self.dropped.append(join_keys(path, key))
            else:
                where = join_keys(path, key)
                known = nearest(key, [*names, *beside])
                raise UserError(f"{self.origin(where)}: {where}: unknown key; {known}")
        for f in fields(schema):
            if default_of(f) == REQUIRED and values.get(f.name, REQUIRED) == REQUIRED:
                why = "required key is missing"
                if "doc" in f.metadata:
                    why = f"{why} ({f.metadata['doc']})"
                # a changed name is what requires other keys
                origin = self.origin(join_keys(path, "name"))
                raise UserError(f"{origin}: {join_keys(path, f.name)}: {why}")
        return values

    def _plain(self, schema: Any, values: Mapping[str, Any], path: str) -> Any:
        """The instance, its plain values checked and converted by OmegaConf; sections are left for later."""
        hints = hints_of(schema)
        later: dict[str, Any] = {}
        plain: dict[str, Any] = {}
        for f in fields(schema):
            value = values.get(f.name, default_of(f))
            if "slot" in f.metadata or nested_section(hints[f.name], value):
                later[f.name] = None
            elif f.name in values:
                plain[f.name] = tidy(value, hints[f.name])
        converted = self._converted(schema, plain, path)
        with self._component_errors("Config", path):
            return schema(**later, **converted)

    def _converted(self, schema: Any, values: dict[str, Any], path: str) -> dict[str, Any]:
        """Plain values, converted by OmegaConf all at once; the error names the first that cannot be converted."""
        hints = hints_of(schema)
        try:
            # a literal `${...}` must not be resolved among the other values of the section
            together = "${" not in repr(values)
            if together and all(fits(value, hints[key]) for key, value in values.items()):
                converted = convert(schema, values)
                if not not_finite(converted):
                    return converted
        except OmegaConfBaseException:
            pass
        converted = {}
        for key, value in values.items():
            cause: OmegaConfBaseException | None = None
            try:
                if fits(value, hints[key]):
                    one = convert(schema, {key: value})
                    self._check_finite(one, path, hints[key])  # the string "inf" becomes a number
                    converted |= one
                    continue
            except OmegaConfBaseException as error:
                cause = error
            except ConfigError as error:
                where = join_keys(path, key)
                raise UserError(f"{self.origin(where)}: {where}: {error.why}") from error
            self._check_finite({key: value}, path, hints[key])
            why = f"must be {describe_type(hints[key])}"
            raise self.error(join_keys(path, key), value, why) from cause
        return converted

    def _check_finite(self, values: Mapping[str, Any], path: str, hint: Any) -> None:
        """Raises `UserError` for the first NaN or infinity in a value that may hold numbers with fractions."""
        found = not_finite(values)
        if found and takes_floats(hint):
            keys, number = found
            for key in keys:
                path = join_keys(path, key)
            raise self.error(path, number, "must be finite")

    def _sections(self, kind: Any, form: str, value: Any, path: str, parent: Any) -> Any:
        """The core's own sections that a field holds: one, a list or a mapping of them."""
        if form == "list":
            items = self._list(value, path, "sections")
            return [self.section(kind, item, f"{path}.{i}", parent) for i, item in enumerate(items)]
        if form == "mapping":
            sections: dict[str, Any] = {}
            for key, item in self._mapping(value, path).items():
                sections[key] = self.section(kind, item, join_keys(path, key), parent)
            return sections
        return self.section(kind, value, path, parent)

    def _read_children(self, instance: Any, f: Any, value: Any, path: str, parent: Any) -> None:
        """Sets the components that a field holds, now or in `read_components`."""
        slot = f.metadata["slot"]
        many = f.metadata["many"]
        if many == "one":
            default = default_of(f)
            if value is None and (default is None or f.metadata.get("optional")):
                return
            if isinstance(value, Mapping) and "name" not in value and isinstance(default, Mapping):
                value = {**default, **value}
            self._read_child(vars(instance), f.name, slot, value, path, parent)
            return
        holder: Any
        items: Mapping[Any, Any]
        if many == "list":
            items = dict(enumerate(self._list(value, path, f"{slot} sections")))
            holder = [None] * len(items)
        else:
            items = self._mapping(value, path)
            holder = dict.fromkeys(items)
        setattr(instance, f.name, holder)
        for key, item in items.items():
            self._read_child(holder, key, slot, item, join_keys(path, str(key)), parent)

    def _read_child(
        self, holder: Any, key: Any, slot: str, raw: Any, path: str, parent: Any
    ) -> None:
        if self._defer:
            named = self._named(slot, raw, path)
            self._deferred.append(_Deferred(holder, key, slot, named, path, parent))
        else:
            holder[key] = self.component(slot, raw, path, parent)

    def read_components(self, registry: Registry, recipe: Any) -> None:
        """Reads the sections of components that were deferred, in the recipe's order, and checks the whole.

        Args:
            registry: the components by name, now with those of the modules that the recipe names.
            recipe: what the sections belong to.

        Raises:
            UserError: a name is unknown (those of deferred sections are looked up before the first is imported), a
                section is wrong, or `recipe.check_components` does not allow their combination.
        """
        self.registry = registry
        self._defer = False
        for one in self._deferred:
            self._find(one.slot, one.raw["name"], one.path)
        for one in sorted(self._deferred, key=_is_corpus, reverse=True):
            section = self.component(one.slot, one.raw, one.path, one.parent)
            one.holder[one.key] = section
            if _is_corpus(one) and self._check_source:
                with self._error_at(one.path):
                    section.component(section.config).check_source()
        self._deferred.clear()
        with self._component_errors("check_components", "", recipe):
            recipe.check_components()

    def _named(self, slot: str, raw: Any, path: str) -> Mapping[str, Any]:
        """The raw section of a component, after a check that it has a name."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
            known = ", ".join(self.registry.names(slot))
            raise self.error(path, raw, f"must be a section with a `name` ({slot}: {known})")
        return raw

    def component(self, slot: str, raw: Any, path: str, parent: Any) -> Section:
        """Returns the section of a component, written as `{name: ..., its own keys}`."""
        raw = self._named(slot, raw, path)
        offer = self._find(slot, raw["name"], path)
        with self._error_at(f"{path}.name"):
            component, provenance = offer.load()
        rest = {key: value for key, value in raw.items() if key != "name"}
        for key in rest:
            if key in component.rejected_keys and key not in self.inherited.get(path, ()):
                why = f"{raw['name']} has no {key}: {component.rejected_keys[key]}"
                raise self.error(join_keys(path, key), rest[key], why)
        outer = self._component
        self._component = f"{slot} {raw['name']!r} of {provenance.distribution} ({offer.target})"
        try:
            config = self.section(component.Config, rest, path, parent, beside=["name"])
            # checked here, because a failure in another component's check would blame that one
            with self._component_errors("capabilities_of", path):
                capabilities = component.capabilities_of(config)
                if not isinstance(capabilities, frozenset | set):
                    raise TypeError(f"{capabilities!r} is not a frozenset of words")
        finally:
            self._component = outer
        return Section(slot, raw["name"], component, config, provenance)

    @contextmanager
    def _component_errors(self, method: str, path: str, config: Any = None) -> Iterator[None]:
        """Reports what a component's own code raises inside this context.

        Args:
            method: the component's method, for the error message.
            path: the key path of the section.
            config: the instance in which a `ConfigError` names a key; None if there is none yet.

        Raises:
            UserError: for a `ConfigError`, the sentence about its key; for any other exception, that the component is
                broken. Another exception of the core's own sections is our bug and is raised as it is.
        """
        try:
            try:
                yield
            except ConfigError as error:
                value = {} if config is None else value_at(config, error.key)
                raise self.error(join_keys(path, error.key), value, error.why) from error
        except UserError:
            raise
        except Exception as cause:
            if not self._component:
                raise
            why = f"{self._component} is broken: its {method} raises {format_error_at(cause)}"
            raise UserError(f"{self.origin(path)}: {path}: {why}") from cause

    def _find(self, slot: str, name: str, path: str) -> Entry:
        """The one offer for a name, not imported yet; `path` is the key path of the section that names it."""
        with self._error_at(f"{path}.name"):
            return self.registry.find(slot, name)

    @contextmanager
    def _error_at(self, path: str) -> Iterator[None]:
        """Adds the origin and the key path to an error that is raised inside this context."""
        try:
            yield
        except UserError as cause:
            raise UserError(f"{self.origin(path)}: {path}: {cause}") from cause

    def _list(self, value: Any, path: str, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(path, value, f"must be a list of {what}")
        return value

    def _mapping(self, value: Any, path: str) -> Mapping[str, Any]:
        """The sections by name; those that a later layer set to null are left out."""
        if not isinstance(value, Mapping):
            raise self.error(path, value, "must map names to sections")
        for key in value:
            if not key or "." in key:
                why = f"a name must not be empty or hold a dot, as {key!r} does"
                raise UserError(f"{self.origin(path)}: {path}: {why}")
        return {key: item for key, item in value.items() if item is not None}

    def _check_sizes(self, instance: Any, path: str) -> None:
        """Raises `UserError` for a size that no tensor can have; seeds and budgets may be larger."""
        if path.partition(".")[0] not in SIZED:
            return
        for f in fields(instance):
            value = getattr(instance, f.name)
            if type(value) is int and abs(value) > LARGEST_SIZE and f.name != "seed":
                why = f"must be at most {LARGEST_SIZE}"
                raise self.error(join_keys(path, f.name), value, why)

    def _check(self, instance: Any, path: str, parent: Any) -> None:
        self._check_sizes(instance, path)
        if not hasattr(instance, "check"):
            return
        with self._component_errors("check", path, instance):
            instance.check(parent)


@dataclass(frozen=True)
class _Deferred:
    """The section of a component that is read later.

    Args:
        holder: the list or mapping that the section goes into.
        key: its index or name there.
        slot: the component's slot.
        raw: the section, as plain containers.
        path: its key path in the recipe.
        parent: the instance around it, for `check`.
    """

    holder: Any
    key: Any
    slot: str
    raw: Mapping[str, Any]
    path: str
    parent: Any


def _is_corpus(section: _Deferred) -> bool:
    """Whether a section is that of the corpus: it is read first, because a corpus imports no torch."""
    return section.slot == "corpus"
