"""`catalog`: the table, one component, and packages to begin with that keep their contracts at once."""

import json
import os
import re
import sys
import tomllib
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from lab import ROOT, Lab, forked, run_command_here
from tiers import first_by_default

from core import contracts
from core.authoring.skeleton import FILES, OWN_TESTS, RECIPES, SUMMARIES
from core.contracts.router import CAPABILITIES
from core.extension.loader import installed_registry
from core.extension.registry import SLOTS
from core.recipe.compose import compose
from core.run.training import fit
from core.training.run_folder import RunFolder

OFFER = f"""
    from core.extension.hookspec import hookimpl

    CONTRACTS = "{contracts.VERSION}"


    @hookimpl
    def register(registry):
        registry.corpus("probe", "loom_parts:Probe")
        registry.corpus("odd", "loom_parts:Odd")
        registry.corpus("lost", "loom_parts:Lost")
"""
PARTS = """
    from dataclasses import dataclass
    from typing import Any

    from core.contracts.corpus import Corpus
    from core.contracts.schema import setting


    @dataclass(kw_only=True)
    class Part:
        weight: float = setting(1.0, doc="of this part")


    class Probe(Corpus):
        \"\"\"A corpus to look at.\"\"\"

        rejected_keys = {"paths": "it reads no files"}
        capabilities = frozenset({"tidy"})
        example = {"name": "probe", "limits": (1, 2)}

        @dataclass(kw_only=True)
        class Config:
            limits: list[float] = setting([0.0, float("inf")], doc="from and to")
            parts: list[Part] = setting([], doc="what it is made of")

        def documents(self):
            yield from ()


    class Odd(Probe):
        @dataclass(kw_only=True)
        class Config:
            words: set[str] = setting(doc="in any order")
"""


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the distributions `loom` and `sad`; only forked commands import from it."""
    for name, source in (
        ("loom_plugin", OFFER),
        ("loom_parts", PARTS),
        ("sad_plugin", "raise OSError('no GPU')"),
    ):
        (tmp_path / f"{name}.py").write_text(dedent(source))
    for name, module in (("loom", "loom_plugin"), ("sad", "sad_plugin")):
        folder = tmp_path / f"{name}-2.3.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.3\n")
        (folder / "entry_points.txt").write_text(f"[moeloom.plugins]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed_registry.cache_clear()
    yield tmp_path
    installed_registry.cache_clear()


def listed(lab: Lab) -> dict[str, dict[str, Any]]:
    """The rows of foreign distributions by name."""
    result = lab.command("catalog", "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)
    assert {row["status"] for row in rows if row["distribution"] == "moeloom"} == {"ok"}
    return {row["name"]: row for row in rows if row["distribution"] != "moeloom"}


def test_the_list_reports_who_works_and_why_others_do_not(lab: Lab, strangers: Path) -> None:
    rows = listed(lab)
    assert {name: row["slot"] for name, row in rows.items()} == {
        "lost": "corpus",
        "odd": "corpus",
        "probe": "corpus",
        "sad": "?",
    }
    assert {(row["distribution"], row["version"]) for row in rows.values()} == {
        ("loom", "2.3"),
        ("sad", "2.3"),
    }
    assert rows["probe"]["status"] == "ok"
    assert rows["lost"]["status"].endswith("module loom_parts has no class Lost")
    assert "Odd.Config.words is of type set[str], which no recipe can hold" in rows["odd"]["status"]
    assert rows["sad"]["status"] == "broken: OSError: no GPU"
    assert rows["probe"]["schema"]["limits"]["default"] == [0.0, "inf"]


def test_the_list_reports_what_is_disabled(
    lab: Lab, strangers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOELOOM_DISABLE_PLUGINS", "sad,loom")
    rows = listed(lab)
    assert {name: row["status"] for name, row in rows.items()} == {
        "sad": "disabled",
        "loom": "disabled",
    }
    shown = lab.command("catalog", "show", "corpus", "probe")
    assert shown.code == 2
    assert shown.sentence.endswith(
        "disabled by MOELOOM_DISABLE_PLUGINS, whatever they may offer: loom of loom 2.3; sad of sad 2.3"
    )


def test_the_table_has_every_row_in_100_columns(lab: Lab, strangers: Path) -> None:
    result = lab.command("catalog")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 100
    cells = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines
    ]
    assert cells[1] == ["slot", "name", "distribution", "version", "status"]
    assert ["corpus", "probe", "loom", "2.3", "ok"] in cells
    assert ["corpus", "odd", "loom", "2.3", "broken"] in cells
    assert ["?", "sad", "sad", "2.3", "broken"] in cells
    text = " ".join(result.out.split())
    assert "sad of sad is broken: OSError: no GPU" in text
    assert " broken: corpus 'odd' of loom (loom_parts:Odd): Odd.Config.words is of type" in text


def test_strict_makes_a_broken_plugin_an_error(
    lab: Lab, strangers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOELOOM_STRICT_PLUGINS", "1")
    for arguments in (
        ["show", "corpus", "probe"],
        ["new", "router", "my_router", str(strangers / "mine")],
    ):
        result = lab.command("catalog", *arguments)
        assert result.code == 2
        assert (
            result.sentence
            == "plugin 'sad' of sad 2.3 is broken: OSError: no GPU (MOELOOM_STRICT_PLUGINS=1)"
        )


@pytest.mark.full
def test_strict_lists_everything_and_then_names_all_that_is_broken(
    lab: Lab, strangers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {arguments: lab.command("catalog", *arguments) for arguments in ((), ("--json",))}
    assert {(result.code, result.err) for result in free.values()} == {(0, "")}
    monkeypatch.setenv("MOELOOM_STRICT_PLUGINS", "1")
    for arguments, before in free.items():
        result = lab.command("catalog", *arguments)
        assert result.code == 2
        assert result.out == before.out
        assert result.sentence == (
            "corpus 'lost' of loom 2.3, corpus 'odd' of loom 2.3, plugin 'sad' of sad 2.3 are broken "
            "(MOELOOM_STRICT_PLUGINS=1)"
        )
    monkeypatch.setenv("MOELOOM_DISABLE_PLUGINS", "sad,loom")
    assert lab.command("catalog").code == 0


def test_a_broken_plugin_is_reported_once_by_show(lab: Lab, strangers: Path) -> None:
    def work() -> None:
        warnings.resetwarnings()
        run_command_here("catalog", "show", "corpus", "prob")

    result = forked(work)
    assert result.code == 2
    assert result.err.count("OSError: no GPU") == 1
    assert "did you mean probe" in result.sentence


def test_one_component_is_shown_in_full(lab: Lab) -> None:
    shown = json.loads(lab.command("catalog", "show", "router", "switch", "--json").out)
    assert shown["capability_docs"] == {word: CAPABILITIES[word] for word in shown["capabilities"]}
    assert (
        shown["refuses"]["top_k"]
        == "Switch takes one expert for every token; gshard_dropless takes any number"
    )
    result = lab.command("catalog", "show", "router", "switch")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("router switch  (moeloom ")
    for line in (
        "source: Switch Transformers (arXiv 2101.03961), section 2",
        "capabilities: a router that",
        "  drops: drops some of its assignments",
        "  capacity_factor: float  [default 1.25]",
        "  eval_capacity_factor: float | None  [default null]",
        "      the same in evaluation; null: as in training",
        "  no top_k: Switch takes one expert for every token; gshard_dropless takes any number",
        "router: {name: switch, capacity_factor: 1.25}",
        "contract (core.contracts.router.Router):",
        "Chooses experts for tokens: `(x_TD, adjust_scores, context) -> Routing`.",
    ):
        assert line in lines


@pytest.mark.parametrize(
    "entry",
    first_by_default([key for key in installed_registry().entries if key[0] != "corpus"], keep=6),
    ids="-".join,
)
def test_every_component_is_shown_in_100_columns(entry: tuple[str, str], lab: Lab) -> None:
    result = lab.command("catalog", "show", *entry)
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 100
    example = result.out.partition("\nexample:\n")[2].partition("\n\ncontract (")[0]
    assert yaml.safe_load(example)[entry[0]]["name"] == entry[1]


def test_sections_of_a_components_own_are_shown_with_their_keys(lab: Lab, strangers: Path) -> None:
    output = lab.command("catalog", "show", "corpus", "probe").out
    assert (
        "  parts: list[Part]  [default []]\n      what it is made of\n      weight: float  [default 1.0]\n"
        in output
    )
    assert "  limits: list[float]  [default [0.0, inf]]" in output
    assert "capabilities:\n  tidy\n" in output
    shown = json.loads(lab.command("catalog", "show", "corpus", "probe", "--json").out)
    assert shown["schema"]["parts"]["keys"]["weight"]["default"] == 1.0
    assert shown["example"]["limits"] == [1, 2]


def new(lab: Lab, slot: str, name: str, folder: Path) -> list[str]:
    """Writes a package and returns the files that the command lists."""
    result = lab.command("catalog", "--json", "new", slot, name, folder)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["folder"] == str(folder)
    return list(document["files"])


@pytest.mark.parametrize("slot", RECIPES)
def test_a_new_package_is_whole(slot: str, lab: Lab, tmp_path: Path) -> None:
    name, folder = f"my_{slot}", tmp_path / "mine"
    files = new(lab, slot, name, folder)
    assert sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()
    ) == sorted(files)
    assert len(files) == len(FILES)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == name.replace("_", "-")
    assert project["entry-points"]["moeloom.plugins"] == {name: name}
    assert f'CONTRACTS = "{contracts.VERSION}"' in (folder / name / "__init__.py").read_text()
    for file in folder.rglob("*.*"):
        assert "$" not in file.read_text(encoding="utf-8").replace("${model", "")
        assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 120
    assert yaml.safe_load((folder / f"{name}.yaml").read_text())["extends"] == "dsv3_small"


@pytest.mark.full
@pytest.mark.parametrize("slot", RECIPES)
def test_a_new_package_passes_its_own_tests_and_the_kit(
    slot: str, lab: Lab, tmp_path: Path
) -> None:
    name, folder = f"my_{slot}", tmp_path / "mine"
    new(lab, slot, name, folder)
    installed = any(
        point.value == "core.testing.plugin" for point in entry_points(group="pytest11")
    )
    kit = [] if installed else ["-p", "core.testing.plugin"]

    def work() -> None:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        raise SystemExit(
            pytest.main(["-q", "-p", "no:cacheprovider", *kit, "--moeloom-plugin", name])
        )

    result = forked(work)
    assert result.code == 0, result.out + result.err
    passed = re.search(r"(\d+) passed", result.out)
    assert passed
    assert int(passed[1]) > 2  # its own tests, and the kit's


@pytest.mark.full
@pytest.mark.parametrize("slot", RECIPES)
def test_a_new_package_and_a_new_file_train_the_same_two_steps(
    slot: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"my_{slot}"
    new(lab, slot, name, tmp_path / "mine")
    file = tmp_path / "mine" / f"{name}.py"
    assert lab.command("catalog", "new", slot, name, file).code == 0
    monkeypatch.syspath_prepend(tmp_path / "mine")
    recipe = tmp_path / "mine" / f"{name}.yaml"
    text = recipe.read_text()
    (tmp_path / "mine" / "one.yaml").write_text(text.replace(f"[{name}]", f"[./{name}.py]"))
    corpus = f"data.corpus={{name: files, paths: [{ROOT}/docs/*.md]}}"
    overrides = [] if slot == "corpus" else [corpus]
    losses = []
    for each in (recipe, tmp_path / "mine" / "one.yaml"):
        composed = compose(each, overrides, smoke=True)
        folder = RunFolder(tmp_path / "runs" / each.stem)
        summary = fit(composed, folder, say=lambda _: None)
        assert summary["steps"] == 2
        losses.append(summary["val_loss"])
        used = json.loads((folder.path / "provenance.json").read_text())
        if slot not in OWN_TESTS:
            assert name in json.dumps(used)
    assert losses[0] == losses[1]


@pytest.mark.full
@pytest.mark.parametrize("slot", RECIPES)
def test_a_new_file_passes_the_kit(slot: str, lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "part.py"
    assert lab.command("catalog", "new", slot, "mine", file).code == 0
    installed = any(
        point.value == "core.testing.plugin" for point in entry_points(group="pytest11")
    )
    kit = [] if installed else ["-p", "core.testing.plugin"]

    def work() -> None:
        os.chdir(tmp_path)
        raise SystemExit(
            pytest.main(["-q", "-p", "no:cacheprovider", *kit, "--moeloom-plugin", "part.py"])
        )

    result = forked(work)
    assert result.code == 0, result.out + result.err
    assert re.search(r"\d+ passed", result.out)


def test_a_name_that_the_module_needs_for_something_else_gets_its_slots_behind_it(
    lab: Lab, tmp_path: Path
) -> None:
    new(lab, "router", "routing", tmp_path / "mine")
    assert (
        "class RoutingRouter(LearnedRouter):" in (tmp_path / "mine/routing/router.py").read_text()
    )
    assert "routing.router:RoutingRouter" in (tmp_path / "mine/routing/__init__.py").read_text()


IMPOSSIBLE = {
    ("ruoter", "mine"): "there is no slot 'ruoter'; did you mean router? known: ",
    (
        "router",
        "my-router",
    ): "'my-router' cannot name a package: use small letters, digits and _, such as my_router",
    ("router", "3rd"): "'3rd' cannot name a package",
    ("router", "class"): "'class' cannot name a package",
    ("router", ""): "'' cannot name a package",
    ("router", "../up"): "'../up' cannot name a package",
    ("router", "switch"): "router 'switch' is offered by moeloom already; choose another name",
    (
        "router",
        "json",
    ): "there is a Python package 'json' already, which yours would hide; choose another name",
    ("router", "torch"): "there is a Python package 'torch' already",
    ("router", "plugins"): "there is a Python package 'plugins' already",
    (
        "router",
        "tests",
    ): "'tests' is what other files and folders of a project are called, so it cannot name the "
    "package; use another one, such as my_router",
    ("router", "test"): "there is a Python package 'test' already",
    **{
        ("router", name): f"{name!r} is what other files and folders"
        for name in ("docs", "build", "dist", "src", "conftest", "setup", "moeloom")
    },
}


@pytest.mark.parametrize(
    ("slot", "name"), first_by_default(IMPOSSIBLE, keep=8, several=True), ids="-".join
)
def test_a_package_that_cannot_be_is_refused(
    slot: str, name: str, lab: Lab, tmp_path: Path
) -> None:
    result = lab.command("catalog", "new", slot, name, tmp_path / "mine")
    assert result.code == 2
    assert result.sentence.startswith(IMPOSSIBLE[slot, name])
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("kind", ["full", "file", "closed"])
def test_a_folder_that_is_not_free_is_left_alone(kind: str, lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    if kind == "full":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    else:
        folder.write_text("mine")
    target = folder / "below" if kind == "closed" else folder
    result = lab.command("catalog", "new", "router", "my_router", target)
    assert result.code == 2
    why = (
        "cannot be written: Not a directory"
        if kind == "closed"
        else "exists already and is not an empty folder"
    )
    assert result.sentence.startswith(f"{target} {why}")
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["mine"]


def test_an_empty_folder_is_good_enough(lab: Lab, tmp_path: Path) -> None:
    new(lab, "ffn", "my_ffn", tmp_path)
    assert (tmp_path / "my_ffn/ffn.py").exists()


def test_there_are_skeletons_for_real_slots_only() -> None:
    assert set(RECIPES) == set(SUMMARIES) == set(SLOTS)
    texts = {file.name for file in (ROOT / "core/authoring/skeletons").iterdir()}
    common = {text for text in FILES.values() if "$" not in text}
    of_one_file = {"registration.txt"}
    of_slots = {f"{slot}.py.txt" for slot in RECIPES}
    assert texts == common | of_one_file | of_slots | {f"{slot}_test.py.txt" for slot in OWN_TESTS}
