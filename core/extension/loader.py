"""Finding plugins: installed entry points, a checkout's own `pyproject.toml`, and a recipe's `plugins:` list.

Distributions are read one by one: pluggy's own loader stops at the first plugin that cannot be imported, and
of two distributions with one entry-point name it reads only the first, without a word.
"""

import importlib
import os
import tomllib
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pluggy

from core.contracts.errors import UserError
from core.contracts.schema import Provenance
from core.extension.hookspec import GROUP, Hooks
from core.extension.registry import Broken, Registry

OWN = "moeloom"


def find_plugins() -> list[Provenance]:
    """Every plugin of this environment, none imported yet: our own first, then by distribution."""
    found = list(_installed())
    if not any(owner.distribution == OWN for owner in found):
        found += _checkout()
    return sorted(found, key=lambda owner: (owner.distribution != OWN, owner.distribution, owner.entry_point))


def _installed() -> Iterator[Provenance]:
    seen = set()
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name is None or name in seen:  # a shadowed copy further down sys.path
            continue
        seen.add(name)
        for point in distribution.entry_points:
            if point.group == GROUP:
                yield Provenance(name, distribution.version or "unknown", point.name, point.value)


def _checkout() -> Iterator[Provenance]:
    """Our own entry points, where this package runs from a checkout that is not installed."""
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not file.is_file():
        return
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") == OWN:
        for name, value in project["entry-points"][GROUP].items():
            yield Provenance(OWN, "checkout", name, value)


def load_plugins(owners: Iterable[Provenance], named: Iterable[str] = ()) -> Registry:
    """Import plugins and the modules that a recipe names, and let each register.

    An installed plugin that fails is kept as `broken` and told in one warning, or is an error under
    `MOELOOM_STRICT_PLUGINS=1`; a module that the recipe names is an error at once. To implement a hook that
    does not exist, or none, is to fail.

    Raises:
        UserError: as above.
    """
    registry = Registry()
    strict = os.environ.get("MOELOOM_STRICT_PLUGINS") == "1"
    for owner in owners:
        try:
            _register(registry, owner)
        except Exception as cause:
            broken = Broken(owner, f"{type(cause).__name__}: {cause}")
            if strict:
                raise UserError(f"{broken} (MOELOOM_STRICT_PLUGINS=1)") from cause
            registry.broken.append(broken)
            warnings.warn(str(broken), stacklevel=2)
    for name in named:
        owner = Provenance("recipe", "", name, name)
        try:
            _register(registry, owner)
        except Exception as cause:
            why = f"{type(cause).__name__}: {cause}"
            raise UserError(f"plugin {name!r}, which the recipe names, is broken: {why}") from cause
    return registry


def _register(registry: Registry, owner: Provenance) -> None:
    """Import one plugin and call its hook; nothing of it is kept where it fails."""
    manager = pluggy.PluginManager("moeloom")
    manager.add_hookspecs(Hooks)
    module = importlib.import_module(owner.module)
    manager.register(module)
    manager.check_pending()
    if not manager.hook.register.get_hookimpls():
        raise ValueError(f"{owner.module} implements no hook `register(registry)`")
    offers = Registry()
    manager.hook.register(registry=offers.owned_by(owner))
    for entries in offers.entries.values():
        for entry in entries:
            registry.add(entry)


@cache
def installed_registry() -> Registry:
    """The registry of this environment, read once per process."""
    return load_plugins(find_plugins())


def registry_for(named: Iterable[str] = ()) -> Registry:
    """The registry that a recipe sees: the environment's, and the modules that it names (each read once)."""
    installed = installed_registry()
    there = {entry.owner.module for entries in installed.entries.values() for entry in entries}
    names = [name for name in dict.fromkeys(named) if name not in there]
    if not names:
        return installed
    registry = Registry()
    for source in (installed, load_plugins([], names)):
        registry.broken += source.broken
        for entries in source.entries.values():
            for entry in entries:
                registry.add(entry)
    return registry
