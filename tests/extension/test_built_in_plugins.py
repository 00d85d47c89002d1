"""Built-in plugins enter through the same entry points as everybody else's, and keep the same promises."""

import importlib
import inspect
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from core.contracts.schema import REQUIRED
from core.extension.hookspec import GROUP
from core.extension.loader import OWN, find_plugins, load_plugins
from core.extension.registry import SLOTS, Entry
from core.recipe.resolve import Resolver

ROOT = Path(__file__).resolve().parents[2]
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
OWN_PLUGINS = [owner for owner in find_plugins() if owner.distribution == OWN]
REGISTRY = load_plugins(OWN_PLUGINS)
ENTRIES = [entry for entries in REGISTRY.entries.values() for entry in entries]
EVERY = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.slot}-{entry.name}")


class Unchecked(Resolver):
    """Reads keys and values only: what must surround a section is its own test's business."""

    def _check(self, instance: Any, path: str, parent: Any) -> None:
        pass


@pytest.mark.parametrize(("point", "module"), POINTS.items())
def test_every_entry_point_of_pyproject_is_a_plugin(point: str, module: str) -> None:
    plugin = importlib.import_module(module)
    assert plugin.__doc__
    assert hasattr(plugin.register, "moeloom_impl"), (
        f"{module}.register is not marked with @hookimpl"
    )
    assert any(owner.module == module for owner in OWN_PLUGINS), (
        f"{point} is in pyproject.toml but is not found"
    )


def test_every_plugin_folder_has_an_entry_point() -> None:
    folders = {f"plugins.{init.parent.name}" for init in (ROOT / "plugins").glob("*/__init__.py")}
    assert folders == set(POINTS.values())


def test_every_built_in_plugin_can_be_read_and_no_name_is_taken_twice() -> None:
    assert REGISTRY.broken == []
    assert {
        key: len(entries) for key, entries in REGISTRY.entries.items() if len(entries) > 1
    } == {}


@EVERY
def test_every_offer_loads_with_its_provenance(entry: Entry) -> None:
    component, provenance = entry.load()
    assert inspect.getdoc(component)
    assert provenance.distribution == OWN
    assert provenance.module == entry.target.partition(":")[0] == component.__module__
    assert provenance.file == ROOT / f"{provenance.module.replace('.', '/')}.py"


@EVERY
def test_every_config_is_keyword_only_and_every_key_says_what_it_means(entry: Entry) -> None:
    component, _ = entry.load()
    assert is_dataclass(component.Config)
    assert component.Config.__doc__
    assert not component.Config.__doc__.startswith(f"{component.Config.__name__}("), (
        "the docstring is generated"
    )
    for f in fields(component.Config):
        assert f.kw_only, f"{f.name} can be given by position"
        assert f.name != "name", "a section's `name` says which component it is"
        assert len(f.metadata.get("doc", "")) >= 5, f"{f.name} has no doc"
        assert f.metadata.get("slot", "router") in SLOTS


@EVERY
def test_every_example_is_a_section_that_the_config_accepts(entry: Entry) -> None:
    component, _ = entry.load()
    assert component.example["name"] == entry.name
    section = Unchecked(REGISTRY, lambda path: "example", {}).component(
        entry.slot, component.example, "section", None
    )
    assert section is not None
    assert section.component is component
    assert isinstance(section.config, component.Config)


@EVERY
def test_every_example_gives_all_required_keys(entry: Entry) -> None:
    component, _ = entry.load()
    required = {
        f.name
        for f in fields(component.Config)
        if f.default == REQUIRED or (f.default, f.default_factory) == (MISSING,) * 2
    }
    assert required <= set(component.example)
