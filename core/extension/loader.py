"""Finding plugins: installed entry points, a checkout's own `pyproject.toml`, and a recipe's `plugins:` list.

Distributions are read one by one: pluggy's own loader stops at the first plugin that cannot be imported, and
of two distributions with one entry-point name it silently reads only the first.
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

from core.contracts.errors import StoppedBySignal, UserError, nearest
from core.contracts.schema import Provenance, Section
from core.extension.checks import PluginError, check_plugin, format_error
from core.extension.hookspec import GROUP, Hooks
from core.extension.plugin_file import DISTRIBUTION, import_file, is_plugin_file, owner_of
from core.extension.registry import Broken, Registry
from core.extension.trace import traced

OWN = "moeloom"
DISABLE = "MOELOOM_DISABLE_PLUGINS"
STRICT = "MOELOOM_STRICT_PLUGINS"


class PluginWarning(UserWarning):
    """A warning about plugins that stops nothing; the commands print it in one line."""


def find_plugins() -> list[Provenance]:
    """Finds every plugin of this environment without importing any: our own first, then by distribution."""
    found = list(_installed())
    if not any(owner.distribution == OWN for owner in found):
        found += _checkout()
    return sorted(found, key=_own_first)


def _own_first(owner: Provenance) -> tuple[bool, str, str]:
    return owner.distribution != OWN, owner.distribution, owner.entry_point


def _installed() -> Iterator[Provenance]:
    """Yields the entry points of every installed distribution."""
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
    """Yields our own entry points, if this package runs from a checkout that is not installed."""
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
    """Imports plugins and the modules that a recipe names, and calls the `register` of each.

    An installed plugin that fails is kept as `broken` and reported in one warning; under `MOELOOM_STRICT_PLUGINS=1`
    it is an error. A module that the recipe names and that fails is always an error. A plugin also fails if it
    implements an unknown hook, or none, or was built for other contracts.

    Args:
        owners: the plugins.
        named: further modules.
        disabled: those of the plugins that are not imported.
        survey: keep every broken plugin without a warning or an error, for a list of all plugins.

    Raises:
        UserError: a plugin is broken, under the conditions above.
    """
    registry = Registry()
    registry.disabled = list(disabled)
    for owner in owners:
        if owner in registry.disabled:
            continue
        try:
            _register(registry, owner)
        except StoppedBySignal:
            raise
        except (Exception, SystemExit) as cause:
            broken = Broken(owner, format_error(cause))
            registry.broken.append(broken)
            if survey:
                continue
            if strict():
                raise UserError(f"{broken} ({STRICT}=1)") from cause
            warnings.warn(str(broken), PluginWarning, stacklevel=1)
    for name in named:
        module = name
        try:
            owner = Provenance("recipe", "", name, name)
            if is_plugin_file(name):
                owner = owner_of(name)
                module = owner.module
            _register(registry, owner)
        except StoppedBySignal:
            raise
        except (Exception, SystemExit) as cause:
            why = f"{format_error(cause)}{_not_found_hint(cause, name)}"
            if module != name:
                why = why.replace(module, Path(name).name)
            raise UserError(f"plugin {name!r}, which the recipe names, is broken: {why}") from cause
    return registry


def _not_found_hint(cause: BaseException, module: str) -> str:
    """What to do if Python does not find the module that a recipe names, or a package around it; else empty."""
    if not isinstance(cause, ModuleNotFoundError) or not cause.name:
        return ""
    if not f"{module}.".startswith(f"{cause.name}."):
        return ""
    hint = "install its package, or run from the folder that holds it"
    return f"; Python must find it from here: {hint}"


def _register(registry: Registry, owner: Provenance) -> None:
    """Imports one plugin and calls its hook; if that fails, nothing of it is kept."""
    if not re.fullmatch(r"\w+(\.\w+)*", owner.module):
        raise PluginError(
            f"{owner.module!r} is not the name of a module, such as my_package or my_package.plugin"
        )
    with traced(f"plugin {owner.entry_point!r}", owner, owner.module):
        if owner.distribution == DISTRIBUTION:
            module = import_file(owner)
        else:
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
    """Reads the registry of this environment once per process, without what `MOELOOM_DISABLE_PLUGINS` names."""
    owners = find_plugins()
    return load_plugins(owners, disabled=_disabled(owners))


def default_section(slot: str, name: str) -> Section:
    """A component of this environment with the default settings, as a section of a recipe without further keys.

    Raises:
        UserError: no plugin offers it.
    """
    component, provenance = installed_registry().find(slot, name).load()
    return Section(slot, name, component, component.Config(), provenance)


def surveyed_registry() -> Registry:
    """Reads the registry for a list of all plugins: a broken one is kept, without a warning or an error."""
    owners = find_plugins()
    return load_plugins(owners, disabled=_disabled(owners), survey=True)


def registry_for(named: Iterable[str] = ()) -> Registry:
    """Returns the registry that a recipe sees: the environment's, and the modules that it names (each read once).

    Raises:
        UserError: a module that it names is broken, or disabled.
    """
    installed = installed_registry()
    registered = installed.modules()
    names = [name for name in dict.fromkeys(named) if name not in registered]
    for owner in installed.disabled:
        if owner.module in names:
            who = f"{owner.entry_point!r} of {owner.distribution} {owner.version}"
            raise UserError(
                f"plugin {who}, which the recipe names, is disabled by {DISABLE}={os.environ.get(DISABLE)}"
            )
    if not names:
        return installed
    registry = Registry()
    registry.absorb(installed)
    registry.absorb(load_plugins([], names))
    return registry


def _disabled(owners: list[Provenance]) -> list[Provenance]:
    """The plugins that `MOELOOM_DISABLE_PLUGINS` names, by entry point or distribution; warns about other names."""
    listed = os.environ.get(DISABLE, "").split(",")
    disabled_names = [name.strip() for name in listed if name.strip()]
    known: set[str] = set()
    for owner in owners:
        known |= {owner.entry_point, _canonical(owner.distribution)}
    unknown = [name for name in disabled_names if not known & {name, _canonical(name)}]
    if unknown:
        names = ", ".join(map(repr, unknown))
        warnings.warn(
            f"{DISABLE}: no plugin or distribution is named {names}; {nearest(unknown[0], known)}",
            PluginWarning,
            stacklevel=1,
        )
    distributions = set(map(_canonical, disabled_names))
    found = []
    for owner in owners:
        if owner.entry_point in disabled_names or _canonical(owner.distribution) in distributions:
            found.append(owner)
    return found


def _canonical(distribution: str) -> str:
    """The normalised form in which package indexes compare a distribution's name."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
