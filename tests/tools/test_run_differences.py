"""The comparison of run folders: it finds one bit of a weight and one digit of a metric."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_differences import differences, nested_differences
from safetensors.torch import load_file, save_file

from core.checkpoints.listing import checkpoints_in


@pytest.fixture
def twin(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "twin"))


def flip(tensor: torch.Tensor) -> None:
    """Changes the last bit of the first element."""
    tensor.view(-1)[:1].view(torch.uint8)[0] ^= 1


def change_checkpoint(folder: Path, part: str, name: str) -> None:
    file = checkpoints_in(folder)[-1]
    content = torch.load(file, weights_only=True)
    values = content[part] if part == "state_dict" else content[part][0]["state"][0]
    flip(values[name])
    torch.save(content, file)


def change_text(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def change_column(folder: Path, name: str) -> None:
    """Puts another number into every cell of a column of metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        table = list(reader)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows({**row, name: "1.5"} for row in table)


def change_cell(folder: Path) -> None:
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("loss/total")
    cells = lines[3].split(",")
    digit = cells[column][-1]
    cells[column] = cells[column][:-1] + ("1" if digit != "1" else "2")
    lines[3] = ",".join(cells)
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_load(folder: Path) -> None:
    tensors = load_file(folder / "loads.safetensors")
    tensors["load.blocks.1"][0, 0] += 1
    save_file(tensors, folder / "loads.safetensors")


def change_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary["val_loss"] += 1e-12
    (folder / "summary.json").write_text(json.dumps(summary))


CHANGES: dict[str, tuple[Any, str]] = {
    "a bit of a weight": (
        lambda f: change_checkpoint(f, "state_dict", "model.embedding.weight"),
        "state_dict: model.embedding.weight differs in 1 of",
    ),
    "a bit of a selection bias": (
        lambda f: change_checkpoint(f, "state_dict", "model.blocks.1.ffn.balance.0.bias"),
        "blocks.1.ffn.balance.0.bias differs",
    ),
    "a bit of a moment": (
        lambda f: change_checkpoint(f, "optimizer_states", "exp_avg"),
        "optimizer_states: 0.state.0",
    ),
    "the last digit of a loss": (change_cell, "loss/total is"),
    "one assignment": (change_load, "loads: load.blocks.1 differs in 1 of"),
    "a rounding in the summary": (change_summary, "summary.json: val_loss"),
    "a key of the recipe": (
        lambda f: change_text(f / "recipe.yaml", "seed: 3", "seed: 4"),
        "recipe.yaml: seed is 3 and 4",
    ),
    "a letter of the sample": (
        lambda f: (f / "sample.txt").write_text("other"),
        "sample.txt differs",
    ),
}


def test_a_run_and_its_copy_are_the_same(finished: Path, twin: Path) -> None:
    assert differences(finished, twin) == []


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_named(name: str, finished: Path, twin: Path) -> None:
    change, sentence = CHANGES[name]
    change(twin)
    found = differences(finished, twin)
    assert len(found) == 1, found
    assert sentence in found[0]


def test_columns_of_the_clock_and_new_keys_with_defaults_are_no_difference(
    finished: Path, twin: Path
) -> None:
    change_column(twin, "tokens_per_second")
    recipe = yaml.safe_load((twin / "recipe.yaml").read_text())
    recipe["model"]["new_part"] = {"name": "as_before"}
    (twin / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert differences(finished, twin) == []
    assert differences(twin, finished) == [
        "recipe.yaml: model.new_part.name is 'as_before' and 'missing'"
    ]


def test_a_missing_row_a_column_and_a_dtype_are_differences(finished: Path, twin: Path) -> None:
    text = (twin / "metrics.csv").read_text().splitlines()
    (twin / "metrics.csv").write_text("\n".join(text[:-1]) + "\n")
    assert any("rows" in line for line in differences(finished, twin))
    one, two = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    assert nested_differences({"a": one}, {"a": two}, "x") == [
        "x: a is torch.float32 (2,) and torch.float64 (2,)"
    ]
    assert nested_differences({"a": one}, {"a": -one}, "x"), "the sign of zero is a bit"
    assert nested_differences({"a": one, "b": 1}, {"a": one}, "x") == [
        "x: b is only in one of them"
    ]
    assert (
        nested_differences({"a": torch.tensor(torch.nan)}, {"a": torch.tensor(torch.nan)}, "x")
        == []
    )
