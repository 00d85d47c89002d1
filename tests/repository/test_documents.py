"""The documents keep up with the code."""

import csv
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import core
from core.contracts.schedule import Schedule, Segment, WarmupStableDecay
from core.extension.loader import find_plugins, load_plugins
from core.extension.registry import SLOTS, Entry
from core.fit import parser
from core.recipe import model_schema, trainer_keys
from core.recipe import recipe_schema as schema
from core.run.shift import KEYS as KEYS_OF_A_SHIFT
from core.training.resume import MAY_CHANGE, REPRODUCED

from .documents import DOCUMENTS, ROOT, blocks, first_cells, section

RECIPES, TRAINING, PLUGINS = (
    ROOT / "docs" / f"{name}.md" for name in ("recipes", "training", "plugins")
)
SECTIONS = {
    schema.RecipeSchema: "## The recipe",
    model_schema.ModelSection: "## model",
    model_schema.BlockSection: "## model",
    model_schema.RopeSection: "## model",
    model_schema.YarnSection: "## model",
    model_schema.InitSection: "## model",
    schema.DataSection: "## data",
    schema.BatchSection: "## batch and budget",
    schema.BudgetSection: "## batch and budget",
    schema.CheckpointSection: "## checkpoint, validation, recompute",
    schema.ValidationSection: "## checkpoint, validation, recompute",
    schema.RecomputeSection: "## checkpoint, validation, recompute",
    Schedule: "## Schedules",
}
PACKAGES = [file.parent for file in sorted((ROOT / "plugins").glob("*/__init__.py"))]
REGISTRY = load_plugins([owner for owner in find_plugins() if owner.distribution == "moeloom"])


def offers(package: Path) -> list[Entry]:
    """The slots and names that a plugin package registers."""
    entries = (entry for found in REGISTRY.entries.values() for entry in found)
    return [entry for entry in entries if entry.target.startswith(f"plugins.{package.name}.")]


PARTS_OF_SCHEDULES = {f"segments.N.{field.name}" for field in fields(Segment)} | {
    f"wsd.{field.name}" for field in fields(WarmupStableDecay)
}


@pytest.mark.parametrize("section_of", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_key_of_a_recipe_is_documented(section_of: type) -> None:
    documented = first_cells(section(RECIPES, SECTIONS[section_of]))
    assert {field.name for field in fields(section_of)} <= documented  # type: ignore[arg-type]


def test_no_section_of_the_schema_is_left_out() -> None:
    # their keys are in the rows of `tokenizer`, `fim` and `skip_spikes`
    named = {schema.TokenizerSection, schema.FimSection, schema.SpikeSection}
    own = {
        value
        for module in (schema, model_schema)
        for value in vars(module).values()
        if is_dataclass(value) and value.__module__ == module.__name__
    }
    assert own - named <= set(SECTIONS)
    for row, headed in named_rows(named):
        assert {field.name for field in fields(row)} <= set(re.findall(r"`(\w+)`", headed))  # type: ignore[arg-type]
    assert first_cells(section(RECIPES, "## Schedules")) >= PARTS_OF_SCHEDULES


def named_rows(sections: set[type]) -> list[tuple[type, str]]:
    """The row of docs/recipes.md that has the keys of each of some sections."""
    keys = {"TokenizerSection": "tokenizer", "FimSection": "fim", "SpikeSection": "skip_spikes"}
    lines = RECIPES.read_text(encoding="utf-8").splitlines()
    found = []
    for one in sections:
        key = keys[one.__name__]
        found += [(one, line) for line in lines if line.startswith(f"| `{key}` |")]
    assert len(found) == len(sections)
    return found


def test_no_key_is_documented_that_there_is_not() -> None:
    for heading in set(SECTIONS.values()):
        known = {f.name for cls, where in SECTIONS.items() if where == heading for f in fields(cls)}  # type: ignore[arg-type]
        known |= {"extends"} | PARTS_OF_SCHEDULES
        assert first_cells(section(RECIPES, heading)) <= known


def test_the_trainer_keys_are_those_that_are_allowed() -> None:
    documented = set(
        re.findall("`([a-z_]+)`", section(RECIPES, "## The trainer").partition("With")[0])
    )
    assert documented - {"trainer"} == trainer_keys.FREE_TRAINER_KEYS


def test_the_printed_learning_rate_is_the_shipped_one() -> None:
    (block,) = [block for block in blocks(RECIPES, "yaml") if "lr:" in block.text]
    printed = OmegaConf.to_container(OmegaConf.create(block.text))
    shipped = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes/dsv3_671b.yaml"))
    assert printed["optimizer"]["lr"] == shipped["optimizer"]["lr"]  # type: ignore[index]


def test_every_column_and_every_key_of_a_run_has_a_unit(finished: Path) -> None:
    with (finished / "metrics.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    documented = first_cells(section(TRAINING, "## metrics.csv"))
    plain = {re.sub(r"loss/balance/\w+", "loss/balance/<name>", column) for column in columns}
    assert plain - documented == set()
    listed = first_cells(section(TRAINING, "## summary.json"))
    assert set(json.loads((finished / "summary.json").read_text())) == listed - set(KEYS_OF_A_SHIFT)
    assert set(KEYS_OF_A_SHIFT) <= listed


def test_the_run_folder_of_the_readme_is_complete(finished: Path) -> None:
    table = section(ROOT / "README.md", "## What you get").partition("Measured")[0]
    listed = {name.rstrip("/") for name in first_cells(table)}
    assert {file.name for file in finished.iterdir()} == listed


def test_the_sections_that_may_change_on_resume_are_listed() -> None:
    """Every section of a recipe is reproduced, may change with a message, or may change without one."""
    (found,) = re.findall(
        r"\*\*Sections that may change\.\*\*(.*?)\n- \*\*",
        TRAINING.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    with_message, without_message = found.split("Without a message", 1)
    assert set(re.findall(r"`(\w+)`", with_message)) == set(MAY_CHANGE)
    others = {field.name for field in fields(schema.RecipeSchema)} - {*MAY_CHANGE, *REPRODUCED}
    assert set(re.findall(r"`(\w+)`", without_message)) == others


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_every_plugin_package_documents_its_names_and_keys(package: Path) -> None:
    text = (package / "README.md").read_text(encoding="utf-8")
    assert 5 <= len(text.splitlines()) <= 45
    assert offers(package)
    for entry in offers(package):
        component, _ = entry.load()
        assert re.search(rf"\b{entry.name}\b", text.splitlines()[0]), (
            f"the title does not name {entry.name}"
        )
        missing = [
            field.name for field in fields(component.Config) if f"`{field.name}`" not in text
        ]
        assert missing == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_sections_that_a_plugin_package_prints_are_right(package: Path) -> None:
    names = {(entry.slot, entry.name) for entry in offers(package)}
    printed = [yaml.safe_load(block.text) for block in blocks(package / "README.md", "yaml")]
    assert printed
    found = {name for document in printed for name in _names(document)}
    assert found & {name for _, name in names}
    for document in printed:
        for section_ in _sections(document):
            named = [
                entry.load()[0].Config
                for entry in offers(package)
                if entry.name == section_["name"]
            ]
            known = [{field.name for field in fields(config)} for config in named]
            assert not named or any(set(section_) - {"name"} <= keys for keys in known), section_


def test_every_package_of_the_core_has_a_readme() -> None:
    packages = {file.parent for file in (ROOT / "core").glob("*/__init__.py")}
    assert {package.name for package in packages if not (package / "README.md").exists()} == set()


def test_every_test_that_the_architecture_names_is_there() -> None:
    table = section(ROOT / "docs/architecture.md", "## Where the equations live")
    sources = "".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "tests" / "model").glob("test_*.py")
    )
    named = re.findall(r"`(test_\w+)\.\.\.`", table)
    assert named
    assert [name for name in named if f"def {name}" not in sources] == []
    files = re.findall(r"`(test_\w+\.py)`", table)
    assert [name for name in files if not (ROOT / "tests" / "model" / name).exists()] == []


def test_every_name_in_the_code_that_the_architecture_gives_is_there() -> None:
    table = section(ROOT / "docs/architecture.md", "## Where the equations live")
    gone = []
    for row in (
        line.split("|")[2]
        for line in table.splitlines()
        if line.startswith("| report") or "| LF" in line
    ):
        source = ""
        for word in re.findall("`([^`]+)`", row):
            if (ROOT / word).is_file():
                source = (ROOT / word).read_text(encoding="utf-8")
            elif ":" not in word and not re.search(
                rf"(def|class) {word.rpartition('.')[2]}\b", source
            ):
                gone.append(word)
    assert gone == []


def test_the_tutorials_slots_are_those_that_there_are() -> None:
    table = section(PLUGINS, "## The slots")
    rows = [
        re.findall("`([^`]+)`", line)[:2] for line in table.splitlines() if line.startswith("| `")
    ]
    assert dict(rows) == {slot: target.replace(":", ".") for slot, target in SLOTS.items()}
    for _, target in rows:
        module, _, name = target.rpartition(".")
        assert hasattr(import_module(module), name)


@pytest.mark.parametrize("block", blocks(RECIPES, "python"), ids=lambda block: block.lines[-1])
def test_the_python_of_the_recipes_page_runs(block: object) -> None:
    exec(compile(block.text, str(RECIPES), "exec"), {})  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_override_that_a_document_prints_composes(document: Path) -> None:
    for line in document.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\w.* -m core\.fit (dsv3_\w+ .+)$", line):
            arguments = parser().parse_intermixed_args(shlex.split(match[1], comments=True))
            core.compose(arguments.recipe, arguments.overrides)


def _names(value: object) -> set[str]:
    return {section_["name"] for section_ in _sections(value)}


def _sections(value: object) -> list[dict[str, object]]:
    if isinstance(value, dict):
        own = [value] if isinstance(value.get("name"), str) else []
        return own + [found for item in value.values() for found in _sections(item)]
    return [found for item in value for found in _sections(item)] if isinstance(value, list) else []
