"""The extension surface: hooks and slots, each documented and each reachable."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from core.contracts.component import Component
from core.contracts.schema import Provenance
from core.extension import hookspec
from core.extension.hookspec import Hooks, Registrar
from core.extension.registry import SLOTS, Entry, Registry
from core.recipe.compose import compose
from core.recipe.resolve import Resolver

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"
OWNER = Provenance("somebody", "1.0", "point", "somebody.plugin")


def test_the_hooks_are_these_and_no_others() -> None:
    hooks = {
        name: list(inspect.signature(hook).parameters)
        for name, hook in vars(Hooks).items()
        if callable(hook)
    }
    assert hooks == {"register": ["self", "registry"]}


@pytest.mark.parametrize("name", [name for name, hook in vars(Hooks).items() if callable(hook)])
def test_every_hook_is_a_hookspec_and_says_what_each_argument_is(name: str) -> None:
    hook = getattr(Hooks, name)
    assert hasattr(hook, f"{hookspec.hookspec.project_name}_spec"), "not marked with @hookspec"
    documented = inspect.getdoc(hook) or ""
    assert documented.partition("\n")[0].endswith(".")
    _, _, arguments = documented.partition("Args:")
    for parameter in list(inspect.signature(hook).parameters)[1:]:
        assert f"{parameter}:" in arguments


def test_the_slots_are_these_and_no_others() -> None:
    inside = [
        "attention",
        "ffn",
        "residual",
        "router",
        "balancer",
        "loss_head",
        "precision",
        "dispatcher",
    ]
    around = ["checkpoint_format", "optimizer", "corpus", "strategy", "callback", "logger"]
    assert list(SLOTS) == [*inside, *around]


def test_the_methods_of_the_registrar_are_the_slots_and_no_others() -> None:
    methods = [name for name, value in vars(Registrar).items() if inspect.isfunction(value)]
    assert methods == ["add", *SLOTS]
    for slot in SLOTS:
        method = getattr(Registrar, slot)
        assert list(inspect.signature(method).parameters) == ["self", "name", "target"]
        assert f"`{SLOTS[slot].replace(':', '.')}`" in (inspect.getdoc(method) or "")


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_has_a_method_of_the_registrar(slot: str) -> None:
    registry = Registry()
    getattr(registry.owned_by(OWNER), slot)("mine", "somebody.parts:Part")
    assert registry.entries == {(slot, "mine"): [Entry(slot, "mine", "somebody.parts:Part", OWNER)]}
    assert registry.names(slot) == ["mine"]


@pytest.mark.parametrize(("slot", "target"), SLOTS.items())
def test_every_slot_has_a_contract_class_with_a_docstring(slot: str, target: str) -> None:
    module, _, name = target.partition(":")
    contract = getattr(importlib.import_module(module), name)
    assert issubclass(contract, Component)
    assert len(contract.__doc__) > 40
    for method in getattr(contract, "__abstractmethods__", ()):
        assert getattr(contract, method).__doc__, f"{contract.__name__}.{method} says nothing"


def test_a_slot_that_does_not_exist_is_reported_with_the_nearest() -> None:
    registrar = Registry().owned_by(OWNER)
    with pytest.raises(
        AttributeError, match=r"there is no slot 'ruoter'; did you mean router\? known: attention"
    ):
        registrar.ruoter("mine", "somebody.parts:Part")
    with pytest.raises(ValueError, match=r"there is no slot 'ruoter'; did you mean router\?"):
        registrar.add("ruoter", "mine", "somebody.parts:Part")


@pytest.mark.parametrize(
    ("name", "target"),
    [("", "a:B"), ("a/b", "a:B"), ("a", "a.B"), ("a", "a:B:C")],
    ids=["empty", "/", "no :", "two :"],
)
def test_a_name_or_target_of_another_form_is_refused(name: str, target: str) -> None:
    registry = Registry()
    with pytest.raises(ValueError, match="a name has no '/', and a target reads 'module:Class'"):
        registry.owned_by(OWNER).router(name, target)
    assert registry.entries == {}


def test_the_attributes_of_parent_that_the_page_promises_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, set[str]] = {}

    def check(resolver: Resolver, instance: Any, path: str, parent: Any) -> None:
        slot = resolver._component.partition(" ")[0]
        if slot and type(instance).__name__ == "Config":  # not a schedule inside one
            there = {key for key, value in vars(parent).items() if value is not None}
            seen[slot] = seen.get(slot, there) & there

    monkeypatch.setattr(Resolver, "_check", check)
    compose("dsv3_small", ["model.blocks.moe.attention=${model.attention}"])
    _, _, table = PAGE.read_text(encoding="utf-8").partition("## What `check(parent)` sees")
    promised = {}
    for line in re.findall(r"^\| `.*$", table, re.MULTILINE):
        slots, _, keys = (re.findall(r"`([a-z_]+)`", cell) for cell in line.split(" | "))
        promised |= {slot: set(keys) for slot in slots}
    assert set(promised) | {"checkpoint_format"} == set(SLOTS)
    assert len(seen) == len(promised) - 1  # no callback
    for slot, there in seen.items():
        assert promised[slot] <= there, slot
