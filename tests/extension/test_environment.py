"""Plugins that are skipped, plugins that are traced, and those that nobody needs and nobody pays for."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from core.contracts.errors import UserError
from core.contracts.schema import Provenance
from core.extension import trace
from core.extension.loader import installed_registry, registry_for
from core.recipe.compose import compose

ROOT = Path(__file__).resolve().parents[2]
DISABLE, TRACE = "MOELOOM_DISABLE_PLUGINS", "MOELOOM_TRACE_PLUGINS"
BROKEN = "raise RuntimeError('no GPU driver')"

Module = Callable[..., str]
Install = Callable[..., None]


@pytest.mark.parametrize("value", ["extra", "loom-extra", "Loom_Extra", " extra , other"])
def test_a_plugin_is_skipped_by_its_entry_point_or_its_distribution(
    value: str, module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("loom-extra", "2.3", extra=module("loom_extra", BROKEN))
    install("another", other=module("loom_other"))
    monkeypatch.setenv(DISABLE, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry = installed_registry()
    assert registry.broken == []
    assert Provenance("loom-extra", "2.3", "extra", "loom_extra") in registry.disabled
    assert "loom_extra" not in sys.modules
    assert (("corpus", "probe") in registry.entries) == ("other" not in value)


def test_a_distribution_stands_for_all_of_its_plugins(
    module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("loom-extra", one=module("loom_one"), two=module("loom_two"))
    install("another", three=module("loom_three"))
    monkeypatch.setenv(DISABLE, "loom-extra")
    assert [owner.entry_point for owner in installed_registry().disabled] == ["one", "two"]
    assert installed_registry().find("corpus", "probe").owner.distribution == "another"


def test_who_misses_a_name_is_reported_what_is_disabled(
    module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("loom-extra", "2.3", one=module("loom_one"), two=module("loom_two"))
    monkeypatch.setenv(DISABLE, "loom-extra")
    overrides = ["data.corpus={name: probe}"]
    with pytest.raises(UserError) as caught:
        compose("dsv3_small", overrides)
    assert str(caught.value).endswith(
        "data.corpus.name: no corpus is named 'probe'; "
        "known: chat, files, hf_dataset, mixture, package_text, shift, tokens; "
        "disabled by MOELOOM_DISABLE_PLUGINS, whatever they may offer: one, two of loom-extra 2.3"
    )
    compose("dsv3_small")


def test_our_own_plugins_can_be_disabled_too(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "mla")
    with pytest.raises(
        UserError,
        match=r"no attention is named 'mla'; .*disabled by MOELOOM_DISABLE_PLUGINS.*: mla of",
    ):
        compose("dsv3_small")


def test_a_recipe_that_names_a_disabled_plugin_is_reported(
    module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("loom-extra", "2.3", extra=module("loom_extra"))
    monkeypatch.setenv(DISABLE, "extra")
    with pytest.raises(UserError) as caught:
        compose("dsv3_small", ["plugins=[loom_extra]"])
    assert str(caught.value).endswith(
        "plugins: plugin 'extra' of loom-extra 2.3, which the recipe names, "
        "is disabled by MOELOOM_DISABLE_PLUGINS=extra"
    )


def test_what_is_disabled_stays_known_where_a_recipe_names_other_plugins(
    module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("loom-extra", extra=module("loom_extra"))
    monkeypatch.setenv(DISABLE, "extra")
    registry = registry_for([module("beside")])
    assert [owner.entry_point for owner in registry.disabled] == ["extra"]
    assert registry.find("corpus", "probe").owner.module == "beside"


def test_an_unknown_name_is_one_warning_and_nothing_else(
    module: Module, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("loom-extra", extra=module("loom_extra"))
    monkeypatch.setenv(DISABLE, "loom-extras,,extra, nobody")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            registry = installed_registry()
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(
        "MOELOOM_DISABLE_PLUGINS: no plugin or distribution is named 'loom-extras', 'nobody'; did you mean loom-extra"
    )
    assert [owner.entry_point for owner in registry.disabled] == ["extra"]
    assert registry.find("attention", "mla")


def test_what_is_loaded_is_traced_once(
    module: Module,
    install: Install,
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    install("loom-extra", "2.3", extra=module("loom_extra"), sad=module("loom_sad", BROKEN))
    monkeypatch.setenv(TRACE, "1")
    monkeypatch.setattr(trace, "_printed", set())
    with pytest.warns(UserWarning, match="no GPU driver"):
        registry = installed_registry()
    for _ in range(2):
        registry.find("corpus", "probe").load()
    out, err = capfd.readouterr()
    assert out == ""
    lines = [
        re.sub(r"\d+\.\d ms", "N ms", line) for line in err.splitlines() if "loom-extra" in line
    ]
    assert lines == [
        f"trace: plugin 'extra' of loom-extra 2.3: loom_extra from {site}/loom_extra.py, N ms",
        "trace: plugin 'sad' of loom-extra 2.3: loom_sad from no file, N ms, failed",
        f"trace: corpus 'probe' of loom-extra 2.3: loom_extra:Probe from {site}/loom_extra.py, N ms",
    ]
    assert re.search(
        r"^trace: plugin 'mla' of moeloom \S+: plugins.mla from .*__init__.py, \d+\.\d ms$",
        err,
        re.M,
    )


def test_the_time_that_is_traced_is_that_of_the_import(
    module: Module, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from .conftest import CORPUS

    monkeypatch.setenv(TRACE, "1")
    registry_for([module("slow", CORPUS + "\n    import time\n    time.sleep(0.05)\n")])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "'slow'" in line]
    match = re.fullmatch(r"trace: plugin 'slow' of recipe: slow from .*slow.py, (\d+\.\d) ms", line)
    assert match
    assert 50 <= float(match[1]) < 5000


def test_nothing_is_traced_unasked(
    module: Module, install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install("loom-extra", extra=module("loom_extra"))
    installed_registry().find("corpus", "probe").load()
    assert capfd.readouterr().err == ""


SCRIPT = """
import json, sys
import core
recipe = core.compose("dsv3_small")
used = sorted({section.component.__module__ for section in recipe.sections()})
from core.extension.loader import installed_registry
entries = [entry for offers in installed_registry().entries.values() for entry in offers]
targets = sorted({entry.target.partition(":")[0] for entry in entries})
light = sorted({entry.owner.module for entry in entries})
print(json.dumps([used, targets, light, sorted(sys.modules)]))
"""


@pytest.mark.full
def test_only_what_a_recipe_uses_is_imported() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    used, targets, light, loaded = map(set, json.loads(done.stdout))
    assert light <= loaded
    assert used & targets == targets & loaded
    assert {"plugins.multi_head.attention", "plugins.switch.router"} <= targets - loaded
