"""The functions with which a component declares the schema of its own recipe section.

A component nests a keyword-only dataclass `Config`; its fields are the keys of the YAML section:

    class TopK(Router):
        @dataclass(kw_only=True)
        class Config:
            top_k: int = setting(doc="experts per token")
            router: Child = child("router", doc="chooses the experts of every token")

A field without a default is required. A `child` is a section with a `name` of its own, whose schema
is the `Config` of the component of that name; after validation its value is a `Section` (a list or a mapping of
them for `children`). Modules that hold a `Config` do not use `from __future__ import annotations`:
OmegaConf must see the types themselves.
"""

from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REQUIRED = "???"
"""OmegaConf's mark for a value that the recipe must give."""

Child = Any
"""The annotation of a field that holds a `Section` (or a list or mapping of them)."""


def setting(default: Any = REQUIRED, *, doc: str) -> Any:
    """Declares a key of a section: its default (without one it is required) and one line that says what it means."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def child(
    slot: str,
    default: Any = REQUIRED,
    *,
    doc: str,
    outer: bool = False,
    optional: bool = False,
) -> Any:
    """Declares a key that holds one component of `slot`; the default is a section such as `{"name": "local"}`.

    If `outer` is set, the component's `check(parent)` gets the section around this one as its parent: an attention
    that a block overrides is still checked as the model's. If `optional` is set, the key may be null although its
    default is a section.
    """
    metadata = {"doc": doc, "slot": slot, "many": "one", "outer": outer, "optional": optional}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def children(slot: str, many: str, default: Any = NO_DEFAULT, *, doc: str) -> Any:
    """Declares a key that holds several components of `slot`; `many` is "list" or "mapping"."""
    metadata = {"doc": doc, "slot": slot, "many": many}
    if default is NO_DEFAULT:
        container: type[Any] = list if many == "list" else dict
        return field(default_factory=container, metadata=metadata)
    return field(default_factory=lambda: type(default)(default), metadata=metadata)


@dataclass(frozen=True)
class Provenance:
    """The origin of a component; every run's `provenance.json` holds it.

    Args:
        distribution: the installed package that offers it.
        version: the version of that package.
        entry_point: the entry point under which the plugin is installed.
        module: the Python module.
        file: the file of the module, once it is imported.
    """

    distribution: str
    version: str
    entry_point: str
    module: str
    file: Path | None = None


@dataclass(frozen=True)
class Section:
    """A validated `{name: ...}` section: which component, with which settings, from which plugin.

    Args:
        slot: the extension point.
        name: the name in the recipe.
        component: the class that is registered under the name.
        config: an instance of `component.Config`.
        provenance: the plugin that registered it.
    """

    slot: str
    name: str
    component: Any
    config: Any
    provenance: Provenance


def sections_in(value: Any) -> Iterator[Section]:
    """Yields every component section in a recipe or in a part of one, children included, in the recipe's order."""
    if isinstance(value, Section):
        yield value
        yield from sections_in(value.config)
    elif isinstance(value, dict):
        for item in value.values():
            yield from sections_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from sections_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from sections_in(getattr(value, name))
