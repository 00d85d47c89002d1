"""Finding plugins (P28, P30, P31): every distribution is read, and a broken one is an error only where it is used."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from core.contracts.errors import UserError
from core.contracts.schema import Provenance
from core.extension import loader
from core.extension.loader import find_plugins, installed_registry, load_plugins, registry_for

Module = Callable[..., str]
Install = Callable[..., None]

BROKEN = "raise RuntimeError('no GPU driver')"


def foreign() -> list[Provenance]:
    """The plugins that are not our own."""
    return [owner for owner in find_plugins() if owner.distribution != loader.OWN]


def test_an_installed_distribution_is_found_without_being_imported(
    module: Module, install: Install
) -> None:
    install("loom-extra", "2.3", extra=module("loom_extra", BROKEN))
    assert foreign() == [Provenance("loom-extra", "2.3", "extra", "loom_extra")]
    assert "loom_extra" not in sys.modules


def test_provenance_names_distribution_version_module_and_file(
    module: Module, install: Install, site: Path
) -> None:
    install("loom-extra", "2.3", extra=module("loom_extra"))
    component, provenance = load_plugins(foreign()).find("corpus", "probe").load()
    assert component.__name__ == "Probe"
    assert provenance == Provenance(
        "loom-extra", "2.3", "extra", "loom_extra", site / "loom_extra.py"
    )


def test_our_own_plugins_come_first_and_say_checkout_where_nothing_is_installed(
    module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("a-loom", extra=module("a_loom"))
    strangers = [d for d in loader.metadata.distributions() if d.metadata["Name"] != loader.OWN]
    monkeypatch.setattr(loader.metadata, "distributions", lambda: strangers)
    found = find_plugins()
    assert [owner.distribution for owner in found] == [loader.OWN] * (len(found) - 1) + ["a-loom"]
    assert {owner.version for owner in found[:-1]} == {"checkout"}
    assert Provenance(loader.OWN, "checkout", "mla", "plugins.mla") in found


def test_an_installed_moeloom_is_read_instead_of_the_checkout(install: Install) -> None:
    install(loader.OWN, "9.9", mla="plugins.mla")
    own = [owner for owner in find_plugins() if owner.distribution == loader.OWN]
    assert own == [Provenance(loader.OWN, "9.9", "mla", "plugins.mla")]


def test_P30_two_distributions_with_the_same_entry_point_name_are_both_read(
    module: Module, install: Install
) -> None:
    install("first", same=module("first_one"))
    install("second", same=module("second_one"))
    assert [(owner.distribution, owner.module) for owner in foreign()] == [
        ("first", "first_one"),
        ("second", "second_one"),
    ]
    assert len(load_plugins(foreign()).entries["corpus", "probe"]) == 2


def test_a_shadowed_copy_of_a_distribution_is_not_read_twice(
    module: Module, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("twice", "1.0", one=module("first_one"))
    shadow = tmp_path / "shadow" / "twice-0.9.dist-info"
    shadow.mkdir(parents=True)
    (shadow / "METADATA").write_text("Metadata-Version: 2.1\nName: twice\nVersion: 0.9\n")
    (shadow / "entry_points.txt").write_text("[moeloom.plugins]\none = first_one\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(shadow.parent)])
    assert [owner.version for owner in foreign()] == ["1.0"]


def test_P31_two_owners_are_reported_only_where_the_name_is_used(
    module: Module, install: Install
) -> None:
    install("first", a=module("first_one"))
    install("second", b=module("second_one"))
    registry = load_plugins(foreign())  # no error, no warning
    with pytest.raises(UserError) as caught:
        registry.find("corpus", "probe")
    assert str(caught.value) == (
        "corpus 'probe' is offered by first (first_one:Probe) and second (second_one:Probe); "
        "write distribution/probe to choose"
    )
    assert registry.find("corpus", "first/probe").owner.distribution == "first"
    assert registry.find("corpus", "second/probe").load()[0].__module__ == "second_one"
    with pytest.raises(
        UserError, match=r"no corpus is named 'third/probe'; did you mean probe\? known: probe"
    ):
        registry.find("corpus", "third/probe")


def test_P30_a_broken_plugin_is_one_warning_however_often_it_is_read(
    module: Module, install: Install
) -> None:
    install("sad", "0.3", extra=module("sad_plugin", BROKEN))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert installed_registry().find("attention", "mla").name == "mla"
            assert registry_for().find("attention", "mla").name == "mla"
    assert [str(w.message) for w in caught] == [
        "plugin 'extra' of sad 0.3 is broken: RuntimeError: no GPU driver",
    ]


def test_P30_a_broken_plugin_is_reported_to_who_asks_for_an_unknown_name(
    module: Module, install: Install
) -> None:
    install("sad", "0.3", extra=module("sad_plugin", BROKEN))
    with pytest.warns(UserWarning, match="plugin 'extra' of sad 0.3 is broken"):
        registry = load_plugins(foreign())
    with pytest.raises(UserError) as caught:
        registry.find("corpus", "probe")
    assert str(caught.value) == (
        "no corpus is named 'probe'; nothing is allowed here; "
        "plugin 'extra' of sad 0.3 is broken: RuntimeError: no GPU driver"
    )


def test_P30_a_broken_plugin_is_always_an_error_when_strict(
    module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sad", "0.3", extra=module("sad_plugin", BROKEN))
    monkeypatch.setenv("MOELOOM_STRICT_PLUGINS", "1")
    with pytest.raises(UserError) as caught:
        load_plugins(foreign())
    assert str(caught.value) == (
        "plugin 'extra' of sad 0.3 is broken: RuntimeError: no GPU driver (MOELOOM_STRICT_PLUGINS=1)"
    )


def test_only_the_value_1_is_strict(
    module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sad", "0.3", extra=module("sad_plugin", BROKEN))
    monkeypatch.setenv("MOELOOM_STRICT_PLUGINS", "0")
    with pytest.warns(UserWarning, match="sad_plugin|sad 0.3"):
        assert len(load_plugins(foreign()).broken) == 1


MISTAKES = {
    "misspelt hook": (
        """
        from core.extension.hookspec import hookimpl

        CONTRACTS = "2.0"

        @hookimpl
        def registr(registry):
            pass
        """,
        "unknown hook 'registr'; did you mean register? known: register",
    ),
    "misspelt second hook": (
        """
        from core.extension.hookspec import hookimpl

        CONTRACTS = "2.0"

        @hookimpl
        def register(registry):
            registry.corpus("probe", "somewhere:Probe")

        @hookimpl
        def unregister(registry):
            pass
        """,
        "unknown hook 'unregister'; did you mean register? known: register",
    ),
    "misspelt argument": (
        """
        from core.extension.hookspec import hookimpl

        CONTRACTS = "2.0"

        @hookimpl
        def register(registrar):
            pass
        """,
        "its hook register takes 'registrar', but must be `def register(registry)`, with these names",
    ),
    "no hook": (
        "def register(registry): pass",
        "wrong_plugin implements no hook: it needs `@hookimpl def register(registry)`; its register is not marked",
    ),
    "misspelt slot": (
        """
        from core.extension.hookspec import hookimpl

        CONTRACTS = "2.0"

        @hookimpl
        def register(registry):
            registry.corpus("probe", "somewhere:Probe")
            registry.ruoter("mine", "somewhere:Mine")
        """,
        "there is no slot 'ruoter'; did you mean router?",
    ),
    "missing import": (
        "import no_such_package",
        "ModuleNotFoundError: No module named 'no_such_package'",
    ),
    "bad syntax": ("def register(registry) pass", "SyntaxError: expected ':'"),
}


@pytest.mark.parametrize(("source", "why"), MISTAKES.values(), ids=MISTAKES)
def test_P30_a_plugin_with_a_mistake_is_broken_and_nothing_of_it_is_kept(
    source: str, why: str, module: Module, install: Install
) -> None:
    install("wrong", wrong=module("wrong_plugin", source))
    with pytest.warns(UserWarning, match="'wrong' of wrong 1.0 is broken"):
        registry = load_plugins(foreign())
    assert [broken.why.startswith(why) for broken in registry.broken] == [True], registry.broken
    assert registry.entries == {}


def test_one_broken_plugin_leaves_the_others_alone(module: Module, install: Install) -> None:
    install("aa", a=module("aa_plugin", BROKEN))
    install("bb", b=module("bb_plugin"))
    with pytest.warns(UserWarning, match="'a' of aa 1.0 is broken"):
        registry = load_plugins(foreign())
    assert registry.find("corpus", "probe").owner.distribution == "bb"


def test_a_module_that_a_recipe_names_is_read_beside_the_installed_ones(
    module: Module, site: Path
) -> None:
    registry = registry_for([module("beside")])
    assert registry.find("attention", "mla").owner.distribution == loader.OWN
    _, provenance = registry.find("corpus", "probe").load()
    assert provenance == Provenance("recipe", "", "beside", "beside", site / "beside.py")
    assert ("corpus", "probe") not in installed_registry().entries, (
        "it must stay with the recipe that named it"
    )


def test_an_installed_plugin_that_a_recipe_also_names_is_one_owner(
    module: Module, install: Install
) -> None:
    install("loom-extra", extra=module("loom_extra"))
    registry = registry_for(["loom_extra", "loom_extra", "plugins.mla"])
    assert registry.find("corpus", "probe").owner.distribution == "loom-extra"
    assert registry.find("attention", "mla").owner.distribution == loader.OWN


def test_a_broken_module_that_a_recipe_names_is_an_error_at_once(
    module: Module, install: Install
) -> None:
    with pytest.raises(UserError) as caught:
        registry_for([module("sad_plugin", BROKEN)])
    assert (
        str(caught.value)
        == "plugin 'sad_plugin', which the recipe names, is broken: RuntimeError: no GPU driver"
    )


def test_an_installed_broken_plugin_that_the_recipe_names_is_an_error(
    module: Module, install: Install
) -> None:
    install("sad", "0.3", extra=module("sad_plugin", BROKEN))
    with (
        pytest.warns(UserWarning, match="sad 0.3 is broken"),
        pytest.raises(UserError, match="plugin 'sad_plugin', which the recipe names, is broken"),
    ):
        registry_for(["sad_plugin"])
