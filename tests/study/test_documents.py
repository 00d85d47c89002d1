"""The page on sweeps keeps up with the code."""

from dataclasses import fields
from pathlib import Path

import yaml
from lab import ROOT
from repository.documents import blocks, first_cells, section

from core.recipe.shipped import shipped_sweeps
from core.study.csv_tables import RUN_COLUMNS, VARIANT_COLUMNS
from core.study.matching import match
from core.study.sweep_file import read_sweep
from core.study.sweep_schema import MatchSection, SkipSection, SweepSchema, VariantSection

PAGE = ROOT / "docs" / "sweeps.md"


def keys(schema: type) -> set[str]:
    """The keys of a section."""
    return {field.name for field in fields(schema)}  # type: ignore[arg-type]


def test_every_key_is_documented_and_no_other() -> None:
    assert first_cells(section(PAGE, "## The file")) == keys(SweepSchema) | keys(VariantSection)
    assert first_cells(section(PAGE, "## Points that are left out")) == keys(SkipSection)
    assert first_cells(section(PAGE, "## What is held equal")) == keys(MatchSection)


def test_every_column_of_the_tables_is_documented_with_its_unit() -> None:
    documented: list[str] = []
    for line in section(PAGE, "## Tables").splitlines():
        if line.startswith("| `"):
            documented += line.split("|")[1].replace("`", "").replace(",", " ").split()
    assert documented == [*RUN_COLUMNS, *VARIANT_COLUMNS]


def test_what_can_be_allowed_is_listed() -> None:
    sweep = read_sweep("routing")
    compared = {line for line in match(sweep).held_equal if " within " not in line}
    (row,) = [
        line
        for line in section(PAGE, "## What is held equal").splitlines()
        if line.startswith("| `allow`")
    ]
    assert set(row.split("`")[3::2]) == compared


def test_the_shipped_sweeps_are_named() -> None:
    introduction = PAGE.read_text(encoding="utf-8").partition("## The file")[0]
    assert all(f"`{name}`" in introduction for name in shipped_sweeps())


def test_the_printed_sweep_can_be_run(tmp_path: Path) -> None:
    (block,) = blocks(PAGE, "yaml")
    file = tmp_path / "printed.yaml"
    file.write_text(block.text, encoding="utf-8")
    sweep = read_sweep(file)
    assert list(yaml.safe_load(block.text)["variants"]) == [
        variant.name for variant in sweep.variants
    ]
    assert len(match(sweep).documents) == 3
