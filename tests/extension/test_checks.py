"""The checks of a plugin before it is used: its version, and the types that a `Config` may have."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch
from omegaconf import OmegaConf

from core import contracts
from core.contracts.corpus import Corpus
from core.contracts.schedule import Schedule, Scheduled
from core.contracts.schema import child, children, setting
from core.extension.checks import PluginError, check_component, check_version
from core.extension.loader import OWN, find_plugins
from core.extension.registry import SLOTS, Registry
from core.recipe.resolve import Resolver


@dataclass(kw_only=True)
class Inner:
    """A section of a plugin's own."""

    width: int = setting(1, doc="its size")


@dataclass(kw_only=True)
class Undocumented:
    """A section that does not say what its key means."""

    width: int = 1


PLAIN = [
    int, float, bool, str, Any, int | None, float | int | str | None, Literal["a", "b"], Literal["a", 1] | None,
    int | Literal["auto"], list[int], list[int] | None, list[list[float]], list[Literal["a"]], list, dict,
    dict[str, int], dict[str, Any], dict[str, list[float]], int | list[int],
]  # fmt: skip
SECTIONS = [
    Inner,
    Inner | None,
    list[Inner],
    dict[str, Inner],
    Scheduled,
    Schedule,
    float | Inner | None,
]
NOT_ALLOWED = [
    set[int], frozenset[str], tuple[int, int], tuple[int, ...], complex, bytes, object, Path, torch.Tensor,
    torch.dtype, type[int], Callable[[int], int], Callable, dict[int, int], list[Path], list[set[int]], int | Path,
    Literal[b"x"], list[Inner] | None, dict[str, list[Inner]], Inner | Schedule,
]  # fmt: skip


def component(hint: Any, default: Any = None, **attributes: Any) -> Any:
    """A corpus whose `Config` has one key of this type."""
    config = make_dataclass("Config", [("key", hint, setting(default, doc="a key"))], kw_only=True)
    config.__qualname__ = "Probe.Config"
    return type(
        "Probe",
        (Corpus,),
        {"Config": config, "documents": iter, "__module__": __name__, **attributes},
    )


@pytest.mark.parametrize("hint", [*PLAIN, *SECTIONS], ids=str)
def test_a_type_that_a_recipe_can_hold_is_let_in(hint: Any) -> None:
    check_component(component(hint), SLOTS)


@pytest.mark.parametrize("hint", PLAIN, ids=str)
def test_what_is_let_in_is_what_omegaconf_knows(hint: Any) -> None:
    OmegaConf.structured(
        make_dataclass("Section", [("key", hint, field(default="???"))], kw_only=True)
    )


@pytest.mark.parametrize("hint", NOT_ALLOWED, ids=str)
def test_a_type_that_no_recipe_can_hold_is_named(hint: Any) -> None:
    with pytest.raises(
        PluginError,
        match=r"^Probe\.Config\.key is of type .+, which no recipe can hold; allowed: int, float",
    ):
        check_component(component(hint), SLOTS)


@pytest.mark.parametrize(
    ("hint", "raw", "read"),
    [
        (Inner, {"width": 3}, Inner(width=3)),
        (Inner | None, None, None),
        (Inner | None, {"width": 3}, Inner(width=3)),
        (list[Inner], [{"width": 3}, {}], [Inner(width=3), Inner(width=1)]),
        (dict[str, Inner], {"one": {"width": 3}}, {"one": Inner(width=3)}),
    ],
    ids=str,
)
def test_a_section_of_a_plugins_own_is_read(hint: Any, raw: Any, read: Any) -> None:
    resolver = Resolver(Registry(), lambda path: "file", {})
    assert resolver.section(component(hint).Config, {"key": raw}, "").key == read


@pytest.mark.parametrize("hint", [Undocumented, list[Undocumented], Undocumented | None], ids=str)
def test_a_section_of_a_plugins_own_is_documented_too(hint: Any) -> None:
    with pytest.raises(
        PluginError,
        match=r"^Undocumented\.width does not say what it means: write `width: int = setting",
    ):
        check_component(component(hint), SLOTS)


def test_children_methods_and_constants_are_no_mistakes() -> None:
    class Config:
        limit: ClassVar[int] = 3
        part: Any = child("router", doc="one")
        parts: Any = children("balancer", "list", doc="several")

        @property
        def twice(self) -> int:
            return 2 * self.limit

        @classmethod
        def of(cls) -> Any:
            return cls

        def check(self, parent: Any) -> None:
            pass

    config = dataclass(kw_only=True)(Config)
    check_component(type("Probe", (Corpus,), {"Config": config, "documents": iter}), SLOTS)


def test_a_config_that_extends_anothers_is_a_dataclass_itself() -> None:
    class Config(Inner):
        height: int = setting(1, doc="its size")

    with pytest.raises(
        PluginError, match=r"Config is not a dataclass: write @dataclass\(kw_only=True\) above it"
    ):
        check_component(type("Probe", (Corpus,), {"Config": Config, "documents": iter}), SLOTS)
    config = dataclass(kw_only=True)(Config)
    check_component(type("Probe", (Corpus,), {"Config": config, "documents": iter}), SLOTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capabilities", ["causal"]),
        ("example", None),
        ("paper", None),
        ("caveat", 3),
        ("rejected_keys", ["top_k"]),
    ],
)
def test_a_class_attribute_of_another_kind_is_named(name: str, value: Any) -> None:
    with pytest.raises(
        PluginError, match=rf"^Probe\.{name} must be a .*, not {str(value)[:1]}".replace("[", r"\[")
    ):
        check_component(component(int, **{name: value}), SLOTS)


def module(**names: Any) -> ModuleType:
    """A plugin module."""
    made = ModuleType("probe_plugin")
    vars(made).update(names)
    return made


@pytest.mark.parametrize(
    ("stated", "offered", "works"),
    [
        ("1.0", "1.0", True),
        ("1.0", "1.3", True),
        ("1.3", "1.3", True),
        ("1.10", "1.9", False),
        ("1.9", "1.10", True),
        ("1.1", "1.0", False),
        ("2.0", "1.0", False),
        ("1.0", "2.0", False),
        ("0.9", "1.0", False),
    ],
)
def test_the_same_major_and_no_later_minor_works(
    stated: str, offered: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contracts, "VERSION", offered)
    if works:
        check_version(module(CONTRACTS=stated))
    else:
        older = stated.partition(".")[0] < offered.partition(".")[0]
        page = "its author finds what to change in docs/migration.md; " if older else ""
        start = f"probe_plugin was built for contracts {stated}, and this moeloom offers {offered}; {page}install a"
        with pytest.raises(PluginError, match=f"^{start}"):
            check_version(module(CONTRACTS=stated))


def test_a_range_of_versions_is_reported_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contracts, "VERSION", "1.3")
    with pytest.raises(
        PluginError, match=r"that offers 2.0, or a release of the plugin for 1\.0 up to 1\.3$"
    ):
        check_version(module(CONTRACTS="2.0"))


@pytest.mark.parametrize(
    "stated", [1.0, 1, None, "", "1", "1.0.0", "v1.0", "1.x", " 1.0", ("1", "0")], ids=repr
)
def test_what_is_no_version_is_reported_with_the_line_to_write(stated: Any) -> None:
    with pytest.raises(PluginError) as caught:
        check_version(module(CONTRACTS=stated))
    assert str(caught.value) == (
        f"probe_plugin states CONTRACTS = {stated!r}, which is not a version; "
        'write CONTRACTS = "2.0" beside its register'
    )


@pytest.mark.parametrize(
    "owner", [o for o in find_plugins() if o.distribution == OWN], ids=lambda o: o.entry_point
)
def test_every_package_of_ours_is_built_for_what_is_offered(owner: Any) -> None:
    assert importlib.import_module(owner.module).CONTRACTS == contracts.VERSION


def test_asking_for_the_version_imports_nothing() -> None:
    heavy = "[name for name in ('torch', 'yaml', 'omegaconf', 'pluggy') if name in sys.modules]"
    code = f"import sys, core.contracts; print(core.contracts.VERSION, *{heavy})"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [contracts.VERSION]
