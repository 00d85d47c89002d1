"""Finding plugins: installed entry points, a checkout's own `pyproject.toml`, and a recipe's `plugins:` list.

Distributions are read one by one: pluggy's own loader stops at the first plugin that cannot be imported, and
of two distributions with one entry-point name it reads only the first, without a word.
"""

import importlib
import os
import re
import tomllib
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pluggy

from core.contracts.errors import UserError, nearest
from core.contracts.schema import Provenance
from core.extension.checks import Mistake, check_plugin, told
from core.extension.hookspec import GROUP, Hooks
from core.extension.registry import Broken, Registry
from core.extension.trace import traced

OWN = "moeloom"
DISABLE = "MOELOOM_DISABLE_PLUGINS"
STRICT = "MOELOOM_STRICT_PLUGINS"


class PluginWarning(UserWarning):
    """Something about plugins that stops nothing; the doors print it in one line."""


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
        if name is None or _canonical(name) in seen:  # a shadowed copy further down sys.path
            continue
        seen.add(_canonical(name))
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


def strict() -> bool:
    """Whether the user wants every broken plugin to be an error."""
    return os.environ.get(STRICT) == "1"


def load_plugins(
    owners: Iterable[Provenance],
    named: Iterable[str] = (),
    disabled: Iterable[Provenance] = (),
    *,
    survey: bool = False,
) -> Registry:
    """Import plugins and the modules that a recipe names, and let each register.

    An installed plugin that fails is kept as `broken` and told in one warning, or is an error under
    `MOELOOM_STRICT_PLUGINS=1`; a module that the recipe names is an error at once. To implement a hook that
    does not exist, or none, is to fail, and so is to be built for other contracts.

    Args:
        owners: the plugins.
        named: further modules.
        disabled: those of the plugins that are not to be imported.
        survey: keep every broken one, without a warning or an error, for who lists them all.

    Raises:
        UserError: as above.
    """
    registry = Registry()
    registry.disabled = list(disabled)
    for owner in owners:
        if owner in registry.disabled:
            continue
        try:
            _register(registry, owner)
        except (Exception, SystemExit) as cause:
            broken = Broken(owner, told(cause))
            registry.broken.append(broken)
            if survey:
                continue
            if strict():
                raise UserError(f"{broken} ({STRICT}=1)") from cause
            warnings.warn(str(broken), PluginWarning, stacklevel=1)
    for name in named:
        owner = Provenance("recipe", "", name, name)
        try:
            _register(registry, owner)
        except (Exception, SystemExit) as cause:
            why = f"{told(cause)}{_whence(cause, name)}"
            raise UserError(f"plugin {name!r}, which the recipe names, is broken: {why}") from cause
    return registry


def _whence(cause: BaseException, module: str) -> str:
    """What to do where Python does not find the very module that a recipe names, or a package around it."""
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
    if not missing or not f"{module}.".startswith(f"{missing}."):
        return ""
    return "; Python must find it from here: install its package, or run from the folder that holds it"


def _register(registry: Registry, owner: Provenance) -> None:
    """Import one plugin and call its hook; nothing of it is kept where it fails."""
    if not re.fullmatch(r"\w+(\.\w+)*", owner.module):
        raise Mistake(f"{owner.module!r} is no module's name, such as my_package or my_package.plugin")
    with traced(f"plugin {owner.entry_point!r}", owner, owner.module):
        module = importlib.import_module(owner.module)
    check_plugin(module)
    manager = pluggy.PluginManager("moeloom")
    manager.add_hookspecs(Hooks)
    manager.register(module)
    offers = Registry()
    manager.hook.register(registry=offers.owned_by(owner))
    registry.absorb(offers)


@cache
def installed_registry() -> Registry:
    """The registry of this environment, read once per process, without what `MOELOOM_DISABLE_PLUGINS` names."""
    owners = find_plugins()
    return load_plugins(owners, disabled=_disabled(owners))


def surveyed_registry() -> Registry:
    """The same for who tells of every broken plugin by himself: no warning, and no error under strict."""
    owners = find_plugins()
    return load_plugins(owners, disabled=_disabled(owners), survey=True)


def registry_for(named: Iterable[str] = ()) -> Registry:
    """The registry that a recipe sees: the environment's, and the modules that it names (each read once).

    Raises:
        UserError: a module that it names is broken, or disabled.
    """
    installed = installed_registry()
    there = {entry.owner.module for entries in installed.entries.values() for entry in entries}
    names = [name for name in dict.fromkeys(named) if name not in there]
    for owner in installed.disabled:
        if owner.module in names:
            who = f"{owner.entry_point!r} of {owner.distribution} {owner.version}"
            raise UserError(f"plugin {who}, which the recipe names, is disabled by {DISABLE}={os.environ.get(DISABLE)}")
    if not names:
        return installed
    registry = Registry()
    registry.absorb(installed)
    registry.absorb(load_plugins([], names))
    return registry


def _disabled(owners: list[Provenance]) -> list[Provenance]:
    """The plugins that `MOELOOM_DISABLE_PLUGINS` names, by entry point or distribution; other names are warned of."""
    asked = [name for name in map(str.strip, os.environ.get(DISABLE, "").split(",")) if name]
    known = {owner.entry_point for owner in owners} | {_canonical(owner.distribution) for owner in owners}
    if unknown := [name for name in asked if name not in known and _canonical(name) not in known]:
        names = ", ".join(map(repr, unknown))
        warnings.warn(
            f"{DISABLE}: no plugin or distribution is named {names}; {nearest(unknown[0], known)}",
            PluginWarning,
            stacklevel=1,
        )
    distributions = set(map(_canonical, asked))
    return [o for o in owners if o.entry_point in asked or _canonical(o.distribution) in distributions]


def _canonical(distribution: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
