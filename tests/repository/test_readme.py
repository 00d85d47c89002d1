"""What the README says can be done."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import core
from core.extension.loader import find_plugins, load_plugins
from core.extension.registry import SLOTS

from .documents import DOCUMENTS, README, ROOT, blocks, commands, section

COMMANDS = [
    "pip install -e . && python -m core.fit recipes/dsv3_small.yaml",
    "pip install -e '.[test]' && pytest",
]


def test_it_opens_with_exactly_two_commands() -> None:
    first = blocks(README)[0]
    assert first.lines == COMMANDS
    assert [block for block in blocks(README) if block.language in ("sh", "bash", "console")] == [
        first
    ]
    assert README.read_text(encoding="utf-8").index("```") < README.read_text(
        encoding="utf-8"
    ).index("\n## ")


def test_its_recipe_composes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(blocks(README, "yaml")[0].text, encoding="utf-8")
    recipe = core.compose(file)
    assert recipe.model.blocks["moe"].ffn.config.router.name == "deepseek_v3"


def test_one_override_swaps_the_attention() -> None:
    before = core.compose("dsv3_small")
    after = core.compose("dsv3_small", ["model.attention.name=mha"])
    assert after.model.attention.name == "mha"
    assert after.model.attention.config.heads == before.model.attention.config.heads
    given = yaml.safe_load((ROOT / "recipes/dsv3_small.yaml").read_text(encoding="utf-8"))["model"][
        "attention"
    ]
    assert set(after.dropped) == {
        f"model.attention.{key}" for key in given if key not in ("name", "heads")
    }


def test_its_python_runs() -> None:
    (block,) = blocks(README, "python")
    names: dict[str, Any] = {}
    exec(compile(block.text, str(README), "exec"), names)
    assert tuple(names["logits_BLV"].shape) == (
        1,
        8,
        core.compose("dsv3_small").data.tokenizer.vocab,
    )


def test_its_slots_and_plugins_are_those_that_there_are() -> None:
    documented = {}
    for line in section(README, "## Slots and built-in plugins").splitlines():
        if line.startswith("| `"):
            slots, names = line.split("|")[1:3]
            documented.update(
                {
                    slot: set(re.findall("`([^`]+)`", names))
                    for slot in re.findall("`([^`]+)`", slots)
                }
            )
    own = load_plugins([owner for owner in find_plugins() if owner.distribution == "moeloom"])
    assert documented == {slot: set(own.names(slot)) for slot in SLOTS}


def test_its_commands_are_those_that_there_are() -> None:
    listed = set(re.findall(r"python -m core\.(\w+)", section(README, "## Commands")))
    assert listed == commands()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_path_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [
        target.partition("#")[0]
        for target in re.findall(r"\]\(([^)]+)\)", text)
        if "://" not in target
    ]
    gone = [target for target in links if target and not (document.parent / target).exists()]
    paths = re.findall(r"`((?:core|plugins|recipes|docs|tests|records)/[\w./]+)`", text)
    assert gone + [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_to_a_heading_has_one(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    anchors = re.findall(r"\]\(#([^)]+)\)", text)
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert set(anchors) <= headings
