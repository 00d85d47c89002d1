"""The command `moeloom`, and what `import moeloom` gives."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lab import ROOT, SMALL, Lab, forked, rows, run_command_here

import core
import moeloom
from core.command import command_line, command_prefix, search_current_folder
from core.extension.loader import installed_registry
from moeloom.commands import command_names, run
from moeloom.search_path import OUR_FOLDER, leave_out_current_folder

HEAVY = ("torch", "lightning", "numpy", "omegaconf", "tokenizers", "rich", "yaml", "pluggy")
PROBE = f"""
import sys
import moeloom
print("core" in sys.modules)
from moeloom.commands import run
run([])
print("HEAVY", *[module for module in {HEAVY} if module in sys.modules])
"""
PLUGIN = '''\
from core.extension.hookspec import hookimpl
from plugins.swiglu.ffn import SwiGLU

CONTRACTS = "2.0"


@hookimpl
def register(registry):
    registry.ffn("mine", "my_part:Mine")


class Mine(SwiGLU):
    """A SwiGLU layer under another name."""
'''
SWEEP = """\
title: Does the bias help?
base: small.yaml
seeds: [3]
baseline: bias
variants:
  bias: {}
  none: {overrides: {model.blocks.moe.ffn.balance: []}}
budget: {steps: 2}
"""
SCRIPT = Path(sys.executable).with_name("moeloom")
Run = Callable[..., subprocess.CompletedProcess[str]]


def exit_code(*arguments: str) -> int:
    """Runs the command in this process; 0 where it returns."""
    try:
        run(list(arguments))
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores what a command changes in its process."""
    monkeypatch.setattr(sys, "argv", ["moeloom"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", sys.modules["__main__"].__spec__)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_it_lists_the_commands(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: moeloom COMMAND ...\n")
    listed = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert {
        "fit",
        "describe",
        "catalog",
        "generate",
        "evaluate",
        "inspect",
        "long_context",
        "placement",
        "sweep",
        "report",
        "convert",
        "bench",
        "cache",
    } == set(listed)
    assert listed["fit"] == "  fit           Train a recipe into a run folder"
    assert max(map(len, listed.values())) <= 100


def test_its_commands_are_the_modules_that_run_as_commands() -> None:
    files = (ROOT / "core").glob("*.py")
    assert command_names() == sorted(
        file.stem
        for file in files
        if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")
    )


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"moeloom {core.__version__}\n"
    assert moeloom.__version__ == core.__version__


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fti", "unknown command 'fti'; did you mean fit? known: bench, cache, catalog, convert, "),
        (
            "--fit",
            "unknown command '--fit'; did you mean fit? known: bench, cache, catalog, convert, ",
        ),
        ("assemble", "unknown command 'assemble'; known: bench, cache, catalog, convert, "),
        ("", "unknown command ''; known: bench, cache, catalog, convert, "),
    ],
)
def test_an_unknown_command_is_one_sentence(
    name: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(name, "recipe") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"moeloom: {sentence}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (("fit",), "moeloom fit"),
        (("describe",), "moeloom describe"),
        (("convert",), "moeloom convert"),
        (("convert", "to-hf"), "moeloom convert to-hf"),
        (("catalog", "show"), "moeloom catalog show"),
    ],
)
def test_help_of_a_command_names_moeloom(
    arguments: tuple[str, ...], program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments, "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {program} [-h]")
    assert "python -m core" not in printed


def test_a_users_mistake_leaves_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("fit") == 2
    assert (
        "moeloom fit: error: the following arguments are required: RECIPE"
        in capsys.readouterr().err
    )
    assert exit_code("describe", "dsv3_smal") == 2
    assert capsys.readouterr().err.startswith("moeloom: dsv3_smal: ")


def test_a_command_finds_the_same_process_as_under_python_m(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Provenance reads `sys.argv`; Lightning starts further ranks as `python -m` of `__main__`."""
    import core.fit

    found = []
    monkeypatch.setattr(core.fit, "main", found.append)
    assert exit_code("fit", "recipe", "seed=3", "--json", "budget.steps=2") == 0
    assert found[0].overrides == ["seed=3", "budget.steps=2"]
    assert sys.argv == [core.fit.__file__, "recipe", "seed=3", "--json", "budget.steps=2"]
    assert sys.modules["__main__"].__spec__ is not None
    assert sys.modules["__main__"].__spec__.name == "core.fit"


BOTH_WAYS = pytest.mark.parametrize(
    ("start", "prefix"),
    [(exit_code, "moeloom "), (run_command_here, "python -m core.")],
    ids=["moeloom", "module"],
)
"""A function that starts a command, and what the user typed before the command's name."""


@BOTH_WAYS
def test_a_command_knows_how_it_was_started(
    start: Callable[..., object], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import core.sweep

    found: list[str] = []
    monkeypatch.setattr(
        core.sweep, "main", lambda _: found.extend([command_prefix("report"), command_line()])
    )
    start("sweep", "a question.yaml", "--smoke")
    assert found == [f"{prefix}report", f"{prefix}sweep 'a question.yaml' --smoke"]


def test_another_program_is_recorded_by_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["some where/my script.py", "--lr", "0.1 0.2"])
    assert command_prefix("fit") == "python -m core.fit"
    assert command_line() == "'my script.py' --lr '0.1 0.2'"


@BOTH_WAYS
def test_a_new_plugin_names_the_commands_as_its_author_types_them(
    start: Callable[..., object], prefix: str, tmp_path: Path
) -> None:
    start("catalog", "new", "router", "my_router", str(tmp_path / "mine"))
    readme = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    assert f"\n{prefix}catalog show router my_router\n{prefix}fit my_router.yaml\n" in readme
    recipe = (tmp_path / "mine/my_router.yaml").read_text(encoding="utf-8")
    assert f"#   {prefix}fit my_router.yaml\n" in recipe


def test_listing_the_commands_imports_nothing_heavy() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    first, *_, last = done.stdout.splitlines()
    assert first == "False", "`import moeloom` imports core"
    assert last == "HEAVY"


def test_the_current_folder_leaves_the_front_of_the_search_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.chdir(tmp_path)
    for first in (str(tmp_path), ""):
        monkeypatch.setattr(sys, "path", [first, "elsewhere"])
        leave_out_current_folder()
        assert sys.path == ["elsewhere"]
        assert os.environ["PYTHONSAFEPATH"] == "1"


def test_a_checkout_stays_at_the_front_of_the_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.chdir(OUR_FOLDER)
    monkeypatch.setattr(sys, "path", [str(OUR_FOLDER), "elsewhere"])
    leave_out_current_folder()
    assert sys.path == [str(OUR_FOLDER), "elsewhere"]
    assert os.environ["PYTHONSAFEPATH"] == ""


@pytest.mark.parametrize("begin", [["elsewhere"], ["", "elsewhere"]], ids=["without", "with"])
def test_a_command_searches_the_current_folder_only_for_a_recipes_modules_and_last(
    begin: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import core.fit

    found: list[list[str]] = []

    def main(_: object) -> None:
        found.append(list(sys.path))
        search_current_folder()
        found.append(list(sys.path))

    monkeypatch.setattr(core.fit, "main", main)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(begin))
    assert exit_code("fit", "recipe") == 0
    assert found == [["elsewhere"], ["elsewhere", str(OUR_FOLDER), str(tmp_path)]]
    assert sys.path == begin
    search_current_folder()
    assert sys.path == begin, "outside of a command the search path is the caller's"


def test_a_folder_that_looks_installed_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata of a distribution in the current folder would make its module a plugin of every command."""
    folder = tmp_path / "evil-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[moeloom.plugins]\nevil = loom_evil\n")
    (tmp_path / "loom_evil.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    done = forked(lambda: (installed_registry.cache_clear(), run_command_here("catalog")))
    assert done.code == 0, done.err
    assert "loom_evil" not in done.out + done.err
    assert not (tmp_path / "it-ran").exists()


def test_the_public_names_are_those_of_core() -> None:
    for name in moeloom.__all__:
        module, _, attribute = moeloom._DEFINITIONS[name].partition(":")
        assert getattr(moeloom, name) is getattr(importlib.import_module(module), attribute)
    assert set(moeloom.__all__) == set(moeloom._DEFINITIONS) == set(dir(moeloom))
    with pytest.raises(AttributeError, match="module 'moeloom' has no attribute 'train'"):
        moeloom.train  # noqa: B018


@pytest.mark.parametrize("name", ["core", "plugins"])
@pytest.mark.parametrize("imported", [False, True], ids=["found", "imported"])
def test_another_package_is_an_error_that_names_it(
    name: str, imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    file = tmp_path / name / "__init__.py"
    file.touch()
    if imported:
        other = ModuleType(name)
        other.__spec__ = spec_from_file_location(name, file)
        monkeypatch.setitem(sys.modules, name, other)
    else:
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=f"needs its own package {name} .* Python finds {file}"):
        moeloom.compose  # noqa: B018


@pytest.mark.parametrize("name", ["core", "plugins"])
def test_a_module_without_a_spec_is_another_package(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ModuleType(name)
    assert other.__spec__ is None
    monkeypatch.setitem(sys.modules, name, other)
    with pytest.raises(ImportError, match=f"package {name} .* finds a module without a file"):
        moeloom.compose  # noqa: B018
    other.__file__ = "elsewhere.py"
    with pytest.raises(ImportError, match=f"package {name} .* finds elsewhere.py under"):
        moeloom.compose  # noqa: B018


@pytest.mark.parametrize("name", ["core", "plugins"])
def test_a_missing_package_is_an_error_that_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"the package {name} is missing in {OUR_FOLDER}"):
        moeloom.compose  # noqa: B018


def test_the_page_about_python_runs(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second block trains the recipe of the tests for two steps in place of the first's."""
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    build, train = (block.partition("```")[0] for block in text.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(build, names)
    costs = names["costs"]
    assert capsys.readouterr().out == f"{costs['params_total']} {costs['flops_per_token']}\n"
    assert names["model"].max_length == names["recipe"].model.rope.max_length
    names["recipe"] = lab.recipe("budget.steps=2")
    exec(train, names)
    assert names["summary"]["steps"] == 2
    assert not names["trained"].training
    assert rows(tmp_path / "runs/first")
    listed = {
        line.split("`")[1].partition("(")[0] for line in text.splitlines() if line[:3] == "| `"
    }
    assert listed == set(moeloom.__all__)


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Run:
    """Runs `moeloom` or `python -m moeloom` beside packages `core` and `plugins` of the user's own."""
    for name in ("core", "plugins"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"raise RuntimeError('the {name} of the user')\n"
        )
    small = SMALL.format(texts=lab.texts).replace("ffn: {name: swiglu", "ffn: {name: mine")
    (tmp_path / "small.yaml").write_text(f"plugins: [my_part]\n{small}", encoding="utf-8")
    (tmp_path / "my_part.py").write_text(PLUGIN, encoding="utf-8")
    (tmp_path / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [str(SCRIPT)]
    if request.param == "module":
        command = [sys.executable, "-m", "moeloom"]
        environment["PYTHONPATH"] = str(ROOT)
    elif not SCRIPT.exists():
        pytest.skip("the command `moeloom` is not installed beside this Python")

    def run_there(*arguments: str) -> subprocess.CompletedProcess[str]:
        pipes: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240}
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, check=False, **pipes
        )

    return run_there


@pytest.mark.full
@pytest.mark.parametrize("elsewhere", ["module"], indirect=True)
def test_it_works_beside_a_core_and_plugins_of_the_users_own(elsewhere: Run) -> None:
    done = elsewhere("describe", "dsv3_small", "--json")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(done.stdout)["params_total"]
        == moeloom.describe(moeloom.compose("dsv3_small"))["params_total"]
    )
    assert elsewhere("fti").returncode == 2


@pytest.mark.full
@pytest.mark.parametrize("elsewhere", ["script"], indirect=True)
def test_it_trains_on_two_ranks_with_a_plugin_of_the_current_folder(
    elsewhere: Run, tmp_path: Path
) -> None:
    two = "strategy={name: ddp, ranks: 2, accelerator: cpu}"
    done = elsewhere("fit", "small.yaml", "budget.steps=2", two, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    recorded = json.loads((tmp_path / "run/provenance.json").read_text(encoding="utf-8"))
    assert recorded["command"].startswith("moeloom fit small.yaml budget.steps=2 ")
    assert "my_part" in {part["module"] for part in recorded["components"]}


@pytest.mark.full
@pytest.mark.parametrize("elsewhere", ["module"], indirect=True)
def test_a_sweep_starts_its_runs_with_a_plugin_of_the_current_folder(elsewhere: Run) -> None:
    done = elsewhere("sweep", "sweep.yaml", "--out", "sweep", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["n"] for row in json.loads(done.stdout)["rows"]] == [1, 1]
