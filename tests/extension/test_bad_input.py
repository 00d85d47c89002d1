"""Every mistake of a plugin is one sentence for the user who needs it, and affects nobody else."""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import ROOT, CommandResult, Lab, forked, run_command_here
from tiers import first_by_default

from core.command import run_command
from core.contracts import VERSION
from core.contracts.errors import UserError
from core.extension.loader import PluginWarning
from core.recipe.model_schema import BlockSection

Module = Callable[..., str]
Install = Callable[..., None]

HEAD = f"""
    from core.extension.hookspec import hookimpl

    CONTRACTS = "{VERSION}"
"""
OFFER = f"""{HEAD}

    @hookimpl
    def register(registry):
        registry.corpus("probe", "bad_parts:Probe")
"""
PART = """
    from collections.abc import Callable
    from dataclasses import dataclass

    import torch

    from core.contracts.corpus import Corpus
    from core.contracts.schema import child, setting


    class Probe(Corpus):
        {config}

        def documents(self):
            yield from ()
"""


def config(*lines: str, decorator: str = "@dataclass(kw_only=True)") -> str:
    """A component with these lines in its `Config`."""
    body = "\n".join(f"            {line}" for line in lines)
    return PART.replace("{config}", f"{decorator}\n        class Config:\n{body}")


@dataclass(frozen=True)
class Case:
    """A mistake.

    Args:
        why: the error message, or its beginning.
        plugin: the light module.
        part: the component's module; "" where none is needed.
    """

    why: str
    plugin: str = OFFER
    part: str = ""


PLUGINS = {
    "raises": Case("RuntimeError: no GPU driver", "raise RuntimeError('no\\n GPU driver')"),
    "raises without a word": Case("NotImplementedError", "raise NotImplementedError"),
    "leaves Python": Case(
        "it exits Python when it is imported (SystemExit: 3)", "import sys; sys.exit(3)"
    ),
    "a class for a target": Case(
        'corpus \'probe\': name and target must be strings, "name" and "module:Class", not the class Probe itself',
        f"""{HEAD}
    class Probe:
        pass

    @hookimpl
    def register(registry):
        registry.corpus("probe", Probe)
    """,
    ),
    "a number for a name": Case(
        'corpus 3: name and target must be strings, "name" and "module:Class", not 3',
        OFFER.replace('"probe"', "3"),
    ),
    "no target": Case(
        "TypeError: Registrar.corpus() missing 1 required positional argument: 'target'",
        OFFER.replace(', "bad_parts:Probe"', ""),
    ),
    "one name twice": Case(
        "corpus 'probe' is registered twice, as bad_parts:Probe and as bad_parts:Other",
        OFFER + '        registry.corpus("probe", "bad_parts:Other")\n',
    ),
    "misspelt hook": Case(
        "unknown hook 'registr'; did you mean register? known: register",
        OFFER.replace("def register", "def registr"),
    ),
    "unmarked hook": Case(
        "bad_plugin implements no hook: it needs `@hookimpl def register(registry)`; its register is not marked",
        OFFER.replace("@hookimpl", ""),
    ),
    "unmarked misspelt hook": Case(
        "bad_plugin implements no hook: it needs `@hookimpl def register(registry)`; is its 'registr' meant?",
        OFFER.replace("@hookimpl", "").replace("def register", "def registr"),
    ),
    "another argument": Case(
        "its hook register takes 'registrar', but must be `def register(registry)`, with these names",
        OFFER.replace("(registry)", "(registrar)"),
    ),
    "unknown slot": Case(
        "there is no slot 'ruoter'; did you mean router? known: ",
        OFFER.replace(".corpus", ".ruoter"),
    ),
    "later major": Case(
        "bad_plugin was built for contracts 3.0, and this moeloom offers 2.0; install a moeloom that offers 3.0, "
        "or a release of the plugin for 2.0",
        OFFER.replace(VERSION, "3.0"),
    ),
    "earlier major": Case(
        "bad_plugin was built for contracts 1.0, and this moeloom offers 2.0; its author finds what to change in "
        "docs/migration.md; install a moeloom that offers 1.0, or a release of the plugin for 2.0",
        OFFER.replace(VERSION, "1.0"),
    ),
    "no version": Case(
        'bad_plugin does not say which contracts it was built for; write CONTRACTS = "2.0" beside its register',
        OFFER.replace(f'CONTRACTS = "{VERSION}"', ""),
    ),
    "a number for a version": Case(
        'bad_plugin states CONTRACTS = 2.0, which is not a version; write CONTRACTS = "2.0" beside its register',
        OFFER.replace(f'"{VERSION}"', VERSION),
    ),
    "circular import": Case(
        "ImportError: cannot import name 'MINE' from partially initialized module 'bad_plugin' (most likely due to a "
        "circular import)",
        f"{OFFER}\n    from bad_parts import OTHER\n    MINE = 1\n",
        "from bad_plugin import MINE\nOTHER = 2\n",
    ),
}
"""Mistakes of a plugin's light module."""

FROM_HERE = "install its package, or run from the folder that holds it"
PROBE = "corpus 'probe' of bad (bad_parts:Probe)"
PARTS = {
    "raises": Case(
        f"{PROBE} cannot be imported: OSError: libfast.so: cannot open",
        part="raise OSError('libfast.so: cannot open')",
    ),
    "leaves Python": Case(
        f"{PROBE} cannot be imported: it exits Python when", part="raise SystemExit(3)"
    ),
    "no class": Case(f"{PROBE}: module bad_parts has no class Probe", part="Prob = 1"),
    "no component": Case(
        f"{PROBE} is not a subclass of core.contracts.corpus.Corpus", part="class Probe: pass"
    ),
    "abstract": Case(
        f"{PROBE}: Probe does not implement documents",
        part=config("pass").replace("def documents", "def document"),
    ),
    "no Config": Case(
        f"{PROBE}: Probe has no Config: nest the schema, `@dataclass(kw_only=True) class Config`",
        part=PART.replace("{config}", "pass"),
    ),
    "Config no dataclass": Case(
        f"{PROBE}: Probe.Config is not a dataclass: write @dataclass(kw_only=True) above it",
        part=config('size: int = setting(1, doc="documents")', decorator=""),
    ),
    "not keyword-only": Case(
        f"{PROBE}: Probe.Config.size must be a keyword-only argument: write @dataclass(kw_only=True)",
        part=config('size: int = setting(1, doc="documents")', decorator="@dataclass"),
    ),
    "a set": Case(
        f"{PROBE}: Probe.Config.size is of type set[int], which no recipe can hold; allowed: int, float, bool, str, ",
        part=config('size: set[int] = setting(doc="documents")'),
    ),
    "a tensor": Case(
        f"{PROBE}: Probe.Config.size is of type torch.Tensor, which no recipe can hold; allowed: int, ",
        part=config('size: torch.Tensor = setting(doc="documents")'),
    ),
    "a callable": Case(
        f"{PROBE}: Probe.Config.size is of type collections.abc.Callable[[int], int], which no recipe can hold",
        part=config('size: Callable[[int], int] = setting(doc="documents")'),
    ),
    "a callable without a type": Case(
        f"{PROBE}: Probe.Config.size has no type, so no recipe can set it: write `size: TYPE = setting(..., doc=...)`",
        part=config("size = torch.relu"),
    ),
    "a setting without a type": Case(
        f"{PROBE} cannot be imported: TypeError: 'size' is a field but has no type annotation",
        part=config('size = setting(1, doc="documents")'),
    ),
    "no doc": Case(
        f"{PROBE}: Probe.Config.size does not say what it means: write `size: int = setting(..., doc=...)`",
        part=config("size: int = 1"),
    ),
    "called name": Case(
        f"{PROBE}: Probe.Config.name: a section's `name` says which component it is, so no key may have that name",
        part=config('name: str = setting(doc="of it")'),
    ),
    "a child of no slot": Case(
        f"{PROBE}: Probe.Config.size: there is no slot 'ruoter'; did you mean router? known: ",
        part=config('size: object = child("ruoter", doc="who chooses")'),
    ),
    "a type that is not there": Case(
        f"{PROBE}: Probe.Config: its types cannot be read: NameError: name 'Nowhere' is not defined",
        part=config('size: "Nowhere" = setting(1, doc="documents")'),
    ),
    "capabilities no set": Case(
        f"{PROBE}: Probe.capabilities must be a frozenset of words, not 'causal'",
        part=config("pass").replace(
            "class Probe(Corpus):", 'class Probe(Corpus):\n        capabilities = "causal"\n'
        ),
    ),
    "circular import": Case(
        f"{PROBE} cannot be imported: ImportError: cannot import name 'Probe' from partially initialized module "
        "'bad_parts' (most likely due to a circular import)",
        part="import bad_rest\nclass Probe: pass\n",
    ),
}
"""Mistakes of a component's module, which nobody sees until its name is used."""

OTHERS = {"bad_rest": "from bad_parts import Probe\n"}


@pytest.fixture
def install_case(module: Module, install: Install) -> Iterator[Callable[[Case], None]]:
    """A function that makes the distribution `bad` of a case."""

    def make(case: Case) -> None:
        install("bad", bad=module("bad_plugin", case.plugin))
        for name, source in {"bad_parts": case.part, **OTHERS}.items():
            module(name, source)

    return make


def broken_row(result: CommandResult) -> str:
    """The status of the one row that is not ok, in a catalog that lists everything else."""
    assert result.code == 0, result.err
    rows = json.loads(result.out)
    assert sum(row["distribution"] == "moeloom" and row["status"] == "ok" for row in rows) > 30
    (row,) = [row for row in rows if row["status"] != "ok"]
    assert (row["distribution"], row["version"]) == ("bad", "1.0")
    return str(row["status"])


def with_warnings(name_of_command: str, *arguments: str | Path) -> CommandResult:
    """Runs a command whose warnings end on stderr, as they do outside of pytest."""

    def work() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run_command_here(name_of_command, *arguments)
            finally:
                for warning in caught:
                    print(f"warned: {warning.message}", file=sys.stderr)

    return forked(work)


@pytest.mark.parametrize("name", first_by_default(PLUGINS, keep=4))
def test_a_broken_plugin_is_one_warning_and_one_error_where_it_is_named(
    name: str, install_case: Callable[[Case], None], lab: Lab
) -> None:
    case = PLUGINS[name]
    install_case(case)
    listed = with_warnings("catalog", "--json")
    assert broken_row(listed).startswith(f"broken: {case.why}")
    assert listed.err == "", "the list names it, so no warning does"
    unrelated = with_warnings("describe", lab.file, "--json")
    assert unrelated.code == 0, unrelated.err
    (warned,) = unrelated.err.splitlines()
    assert warned.startswith(f"warned: plugin 'bad' of bad 1.0 is broken: {case.why}")
    named = lab.command("describe", lab.file, "plugins=[bad_plugin]")
    assert named.code == 2
    assert (
        f"plugins: plugin 'bad_plugin', which the recipe names, is broken: {case.why}"
        in named.sentence
    )


@pytest.mark.parametrize("name", first_by_default(PARTS, keep=6))
def test_a_broken_component_is_one_error_where_its_name_is_used(
    name: str, install_case: Callable[[Case], None], lab: Lab
) -> None:
    case = PARTS[name]
    install_case(case)
    result = lab.command("describe", lab.file, "data.corpus.name=probe")
    assert result.code == 2
    assert result.sentence.startswith(
        f"command line (data.corpus.name=probe): data.corpus.name: {case.why}"
    )
    assert broken_row(lab.command("catalog", "--json")).startswith(f"broken: {case.why}")


def test_a_broken_plugin_stops_no_run_that_does_not_need_it(
    install_case: Callable[[Case], None], lab: Lab
) -> None:
    install_case(PLUGINS["raises"])
    unrelated = with_warnings("describe", lab.file, "--json")
    assert unrelated.code == 0
    assert (
        unrelated.err == "warned: plugin 'bad' of bad 1.0 is broken: RuntimeError: no GPU driver\n"
    )
    result = lab.command("describe", lab.file, "data.corpus.name=probe")
    assert result.code == 2
    assert result.sentence.endswith(
        "no corpus is named 'probe'; known: chat, files, hf_dataset, mixture, package_text, shift, tokens; "
        "plugin 'bad' of bad 1.0 is broken: RuntimeError: no GPU driver"
    )


def test_a_broken_component_stops_no_run_that_does_not_need_it(
    install_case: Callable[[Case], None], lab: Lab
) -> None:
    install_case(PARTS["raises"])
    unrelated = with_warnings("describe", lab.file, "--json")
    assert (unrelated.code, unrelated.err) == (0, "")
    shown = lab.command("catalog", "show", "corpus", "probe")
    assert shown.code == 2
    assert shown.sentence == PARTS["raises"].why


def test_two_plugins_that_import_each_other_are_both_broken_and_the_rest_is_fine(
    module: Module, install: Install, lab: Lab
) -> None:
    install(
        "one", one=module("one_plugin", f"{OFFER}\n    from two_plugin import TWO\n    ONE = 1\n")
    )
    install(
        "two", two=module("two_plugin", f"{OFFER}\n    from one_plugin import ONE\n    TWO = 2\n")
    )
    install("good", good=module("good_plugin"))
    result = lab.command("catalog", "--json")
    assert result.code == 0, result.err
    rows = {(row["distribution"], row["name"]): row["status"] for row in json.loads(result.out)}
    hint = "two modules import each other: move what both need into a third"
    for point in ("one", "two"):
        status = rows[point, point]
        assert status.startswith("broken: ImportError: cannot import name ")
        assert status.endswith(hint)
    assert rows["good", "probe"] == "ok"


def test_a_component_may_import_its_own_light_module(
    module: Module, install: Install, lab: Lab
) -> None:
    install("good", good=module("good_plugin", OFFER))
    module(
        "bad_parts",
        config('size: int = setting(1, doc="documents")') + "\n    import good_plugin\n",
    )
    result = lab.command("describe", lab.file, "data.corpus.name=probe")
    assert result.code == 0, result.err


def test_two_distributions_with_one_name_are_both_named(
    module: Module, install: Install, lab: Lab
) -> None:
    install("first", one=module("first_one"))
    install("second", two=module("second_one"))
    result = lab.command("describe", lab.file, "data.corpus.name=probe")
    assert result.code == 2
    assert result.sentence.endswith(
        "data.corpus.name: corpus 'probe' is offered by first (first_one:Probe) and second (second_one:Probe); "
        "write distribution/probe to choose"
    )
    chosen = lab.command("describe", lab.file, "data.corpus.name=second/probe", "--json")
    assert chosen.code == 0, chosen.err
    (row,) = [row for row in json.loads(chosen.out)["plugins"] if row["slot"] == "corpus"]
    assert (row["distribution"], row["module"]) == ("second", "second_one")
    listed = lab.command("catalog")
    assert (
        "corpus probe has 2 owners: a recipe must write first/probe or second/probe" in listed.out
    )


def test_two_distributions_with_one_module_cannot_be_distinguished(
    module: Module, install: Install, lab: Lab
) -> None:
    install("first", one=module("same_one"))
    install("second", two="same_one")
    result = lab.command("describe", lab.file, "data.corpus.name=probe")
    assert result.code == 2
    assert result.sentence.endswith(
        "corpus 'probe' is offered by first (same_one:Probe) and second (same_one:Probe); Python finds only one "
        "module same_one, so uninstall one of them"
    )


def test_a_recipes_own_plugin_and_an_installed_one_are_distinguished(
    module: Module, install: Install, lab: Lab
) -> None:
    install("first", one=module("first_one"))
    own = f"plugins=[{module('own_one')}]"
    result = lab.command("describe", lab.file, own, "data.corpus.name=probe")
    assert "offered by first (first_one:Probe) and recipe (own_one:Probe)" in result.sentence
    assert lab.command("describe", lab.file, own, "data.corpus.name=recipe/probe").code == 0


@pytest.mark.parametrize("value", ["bad_plugin:register", "bad-plugin", "./bad_plugin.py"])
def test_an_entry_point_that_names_no_module_says_so(
    value: str, module: Module, install: Install, lab: Lab
) -> None:
    module("bad_plugin", OFFER)
    install("bad", bad=value)
    why = f"{value!r} is not the name of a module, such as my_package or my_package.plugin"
    assert broken_row(lab.command("catalog", "--json")) == f"broken: {why}"


def test_a_module_that_is_not_there_is_reported_by_its_name(lab: Lab, site: Path) -> None:
    result = lab.command("describe", lab.file, "plugins=[no_such_plugin]")
    assert result.code == 2
    assert result.sentence.endswith(
        "plugin 'no_such_plugin', which the recipe names, is broken: "
        "ModuleNotFoundError: No module named 'no_such_plugin'; "
        f"Python must find it from here: {FROM_HERE}"
    )


def test_a_package_around_the_module_that_is_not_there_is_reported_too(
    lab: Lab, site: Path
) -> None:
    result = lab.command("describe", lab.file, "plugins=[no_such.plugin]")
    assert result.sentence.endswith(
        f"No module named 'no_such'; Python must find it from here: {FROM_HERE}"
    )


def test_a_module_that_lacks_what_it_imports_gets_no_advice_to_install_itself(
    lab: Lab, module: Module
) -> None:
    result = lab.command(
        "describe", lab.file, f"plugins=[{module('lacking', 'import no_such_package')}]"
    )
    assert result.sentence.endswith(
        "is broken: ModuleNotFoundError: No module named 'no_such_package'"
    )


ANSWERS = {
    "check": (
        "return 1 / 0",
        "check raises ZeroDivisionError: division by zero ({file}, line {line})",
    ),
    "check of another layer": (
        "return parent.experts",
        "check raises AttributeError: 'DataSection' object has no attribute 'experts' ({file}, line {line})",
    ),
    "check without a word": (
        "raise NotImplementedError",
        "check raises NotImplementedError ({file}, line {line})",
    ),
    "check with a key that is none": (
        "raise ConfigError(3, 'must be 4')",
        "check raises AttributeError: ",
    ),
    "capabilities_of": (
        "raise KeyError('size')",
        "capabilities_of raises KeyError: 'size' ({file}, line {line})",
    ),
    "capabilities_of no set": (
        "return ['causal']",
        "capabilities_of raises TypeError: ['causal'] is not a frozenset of words (",
    ),
    "__post_init__": (
        "raise OSError('no\\n file')",
        "Config raises OSError: no file ({file}, line {line})",
    ),
}
METHODS = {
    "check": ("            def check(self, parent):\n                {line}\n", ""),
    "capabilities_of": (
        "",
        "\n        @classmethod\n        def capabilities_of(cls, config):\n            {line}\n",
    ),
    "__post_init__": ("            def __post_init__(self):\n                {line}\n", ""),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_a_component_raises_while_a_recipe_is_read_is_one_sentence(
    name: str, site: Path, install_case: Callable[[Case], None], lab: Lab
) -> None:
    line, why = ANSWERS[name]
    inside, beside = (text.replace("{line}", line) for text in METHODS[name.split()[0]])
    part = config('size: int = setting(1, doc="documents")') + beside
    part = part.replace('doc="documents")\n', f'doc="documents")\n\n{inside}', 1)
    install_case(Case("", part=f"{part}\n    from core.contracts.errors import ConfigError\n"))
    result = lab.command("describe", lab.file, "data.corpus={name: probe}")
    assert result.code == 2
    file = site / "bad_parts.py"
    number = 1 + next(
        i for i, text in enumerate(file.read_text().splitlines()) if text.strip() == line
    )
    expected = why.replace("{file}", str(file)).replace("{line}", str(number))
    assert result.sentence.startswith(
        f"command line (data.corpus={{name: probe}}): data.corpus: {PROBE} is broken: its {expected}"
    )


def test_the_mistake_of_a_component_keeps_its_cause(
    install_case: Callable[[Case], None], lab: Lab
) -> None:
    check = "\n\n            def check(self, parent):\n                return 1 / 0"
    install_case(Case("", part=config('size: int = setting(1, doc="documents")' + check)))
    with pytest.raises(UserError) as caught:
        lab.recipe("data.corpus={name: probe}")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_bug_of_the_core_is_not_taken_for_a_plugins(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: BlockSection, parent: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(BlockSection, "check", check)
    with pytest.raises(ZeroDivisionError, match="ours"):
        lab.recipe()


@pytest.mark.parametrize("filters", ["", "error", "ignore", "error::UserWarning"])
def test_a_command_warns_in_one_line_whatever_pythons_filters_are(
    filters: str, site: Path, tmp_path: Path, install_case: Callable[[Case], None]
) -> None:
    install_case(PLUGINS["raises"])
    paths = {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "PYTHONWARNINGS": filters}
    command = [
        sys.executable,
        "-m",
        "core.catalog",
        "new",
        "router",
        "my_router",
        str(tmp_path / "mine"),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, **paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = "moeloom: warning: plugin 'bad' of bad 1.0 is broken: RuntimeError: no GPU driver\n"
    assert done.stderr == ("" if filters == "ignore" else expected)


def test_other_warnings_of_a_command_stay_as_python_writes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    before, written = warnings.formatwarning, []

    def main(arguments: argparse.Namespace) -> None:
        with pytest.warns(PluginWarning, match="tests see it"):
            warnings.warn("tests see it", PluginWarning, stacklevel=1)
        for category in (PluginWarning, UserWarning):
            written.append(
                warnings.formatwarning(category("one\ntwo"), category, "file.py", 3, "the line")
            )

    run_command(main, argparse.ArgumentParser())
    assert written == [
        "moeloom: warning: one two\n",
        "file.py:3: UserWarning: one\ntwo\n  the line\n",
    ]
    assert warnings.formatwarning is before
