"""docs/generation.md keeps up with the code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lab import Lab
from repository.documents import ROOT, blocks, first_cells, section

from core.generate import parser

PAGE = ROOT / "docs" / "generation.md"


def test_the_example_runs(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = blocks(PAGE, "python")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/first").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.text, names)
    texts = [one.text for one in names["found"]]
    assert len(texts) == 2
    printed = capsys.readouterr().out
    assert all(text in printed for text in texts)
    assert printed.endswith(" tokens/s\n")


def test_every_option_is_in_the_table() -> None:
    documented = first_cells(section(PAGE, "## Options"))
    options = {option for action in parser()._actions for option in action.option_strings}
    assert documented == options - {"-h", "--help"}


def test_every_field_of_the_document_is_in_the_table(lab: Lab, finished: Path) -> None:
    arguments = ("--prompt", "abc", "--tokens", "6", "--speculative", "--json")
    document = json.loads(lab.command("generate", finished, *arguments).out)
    table = section(PAGE, "## `--json`")
    assert set(document) == first_cells(table)
    (row,) = [line for line in table.splitlines() if line.startswith("| `speculative`")]
    assert set(document["speculative"]) <= set(re.findall("`([a-z_]+)`", row))
