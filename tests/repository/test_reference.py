"""docs/reference and docs/stability.md describe all that exists, and nothing that does not."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

import pytest

from core import contracts
from core.authoring.catalog import schema_of
from core.authoring.reference import COMMAND, SHARED, pages
from core.contracts.component import Component
from core.extension.hookspec import Hooks
from core.extension.loader import find_plugins, load_plugins
from core.extension.registry import SLOTS

from .documents import ROOT, commands, first_cells, section

FOLDER, STABILITY = ROOT / "docs/reference", ROOT / "docs/stability.md"
OWN = load_plugins([owner for owner in find_plugins() if owner.distribution == "moeloom"])
ENTRIES = [entry for offers in OWN.entries.values() for entry in offers]
MODULES = sorted(
    {target.partition(":")[0] for target in SLOTS.values()}
    | {f"core.contracts.{n}" for n in SHARED}
)


def contract(slot: str) -> Any:
    """The class that states a slot's contract."""
    module, _, name = SLOTS[slot].partition(":")
    return getattr(importlib.import_module(module), name)


def methods(cls: type) -> set[str]:
    """The public methods and properties that a class itself defines."""
    kinds = (property, cached_property, classmethod, staticmethod)
    return {
        n
        for n, v in vars(cls).items()
        if not n.startswith("_") and (inspect.isfunction(v) or isinstance(v, kinds))
    }


def headings(text: str, level: int) -> list[str]:
    """The first words of the headings of one level, outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line.split()[1] for line in prose.splitlines() if line.startswith(f"{'#' * level} ")]


@pytest.mark.parametrize("name", sorted(pages()))
def test_every_page_is_what_the_contracts_say_now(name: str) -> None:
    file = FOLDER / name
    assert file.exists(), f"{file} is missing: {COMMAND}"
    assert file.read_text(encoding="utf-8") == pages()[name], f"{file} is out of date: {COMMAND}"


def test_there_is_a_page_for_every_slot_and_no_other() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {
        "README.md",
        "shared.md",
        *(f"{slot}.md" for slot in SLOTS),
    }
    assert first_cells((FOLDER / "README.md").read_text()) == set(SLOTS)


def test_every_hook_is_on_the_page_of_hooks_and_no_other() -> None:
    hooks = {name for name, hook in vars(Hooks).items() if inspect.isfunction(hook)}
    assert set(headings(section(FOLDER / "README.md", "## The hook"), 3)) == hooks
    for name in hooks:
        doc = inspect.getdoc(getattr(Hooks, name)) or ""
        assert doc.partition("\n")[0] in section(FOLDER / "README.md", "## The hook")


@pytest.mark.parametrize("slot", [slot for slot in SLOTS if contract(slot) is not Component])
def test_every_method_of_a_contract_is_on_its_page_and_no_other(slot: str) -> None:
    cls = contract(slot)
    text = section(FOLDER / f"{slot}.md", f"## {cls.__name__}")
    assert set(headings(text, 3)) == methods(cls)
    assert set(re.findall(r"^### (\w+) \(must be written", text, re.M)) == set(
        cls.__abstractmethods__
    )
    assert (inspect.getdoc(cls) or "").partition("\n")[0] in text


def test_what_all_components_have_is_on_the_shared_page() -> None:
    text = section(FOLDER / "shared.md", "### Component")
    assert set(headings(text, 4)) == methods(Component)
    assert all(re.search(rf"^{name}: ", text, re.M) for name in inspect.get_annotations(Component))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.slot}-{entry.name}")
def test_every_key_of_a_component_is_on_its_slots_page_and_no_other(entry: Any) -> None:
    component, _ = entry.load()
    text = section(FOLDER / f"{entry.slot}.md", f"### {entry.name}")
    inner = {
        f"{key}.{below}"
        for key, field in schema_of(component.Config).items()
        for below in field["keys"]
    }
    assert first_cells(text) == {field.name for field in fields(component.Config)} | inner
    for field in fields(component.Config):
        assert field.metadata["doc"].replace("|", "\\|") in text
    assert component.paper in text
    assert component.caveat in text


@pytest.mark.parametrize("slot", SLOTS)
def test_every_component_is_on_its_slots_page_and_no_other(slot: str) -> None:
    assert set(headings(section(FOLDER / f"{slot}.md", "## Built-in components"), 3)) == set(
        OWN.names(slot)
    )


def definitions(module: str) -> Iterator[tuple[str, Any]]:
    """Everything public that a module defines: classes, functions, and what classes define."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_in_the_contracts_has_a_docstring(module: str) -> None:
    assert [name for name, node in definitions(module) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("module", MODULES)
def test_every_field_of_a_dataclass_of_the_contracts_is_documented(module: str) -> None:
    """The docstring of the class names each field, where the class has more than three."""
    missing = []
    for name, value in vars(importlib.import_module(module)).items():
        if (
            isinstance(value, type)
            and is_dataclass(value)
            and value.__module__ == module
            and len(fields(value)) > 3
        ):
            missing += [
                f"{name}.{f.name}"
                for f in fields(value)
                if not re.search(rf"\b{f.name}: ", value.__doc__ or "")
            ]
    assert [
        name for name in missing if not name.startswith("Provenance.")
    ] == []  # its names say it


def test_the_stability_page_names_the_version_the_variables_and_the_commands() -> None:
    text = STABILITY.read_text(encoding="utf-8")
    assert f'CONTRACTS = "{contracts.VERSION}"' in text
    assert f"| `CONTRACTS` | with contracts {contracts.VERSION} |" in text
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "core").rglob("*.py"))
    named, used = (set(re.findall(r"MOELOOM_[A-Z_]*[A-Z]", words)) for words in (text, code))
    assert {name for name in used if name.endswith("_PLUGINS")} <= named <= used
    assert set(re.findall(r"python -m core\.([a-z]+)", text)) <= commands()


def test_the_stability_page_prints_the_messages_that_are_raised() -> None:
    from core.extension.checks import PluginError, check_version

    text = STABILITY.read_text(encoding="utf-8")
    for stated in ({"CONTRACTS": "1.0"}, {"CONTRACTS": "3.0"}, {}, {"CONTRACTS": "2"}):
        module = type(inspect)("my_package")
        vars(module).update(stated)
        with pytest.raises(PluginError) as caught:
            check_version(module)
        assert str(caught.value).partition("which is not a version")[2] or str(caught.value) in text
        assert str(caught.value).rpartition("; ")[2] in text
