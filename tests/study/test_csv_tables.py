"""The results as CSV: every run and every variant once, with numbers that read back as they are in the documents."""

import csv
import json
from pathlib import Path

import pytest
from lab import run_command_here

from core.study.csv_tables import RUN_COLUMNS, VARIANT_COLUMNS, as_csv

from .conftest import TWO, ForkPool, Write
from .test_left_out import GRID, RULE


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_text_with_commas_quotes_and_line_breaks_reads_back(tmp_path: Path) -> None:
    rows = [{"a": 'x, "y"\nz', "b": 0.1 + 0.2}, {"a": None, "b": True}, {"b": False}]
    file = tmp_path / "it.csv"
    file.write_text(as_csv(["a", "b"], rows), encoding="utf-8", newline="")
    assert table(file) == [
        {"a": 'x, "y"\nz', "b": "0.30000000000000004"},
        {"a": "", "b": "true"},
        {"a": "", "b": "false"},
    ]


@pytest.mark.full
def test_the_tables_hold_what_the_documents_hold(
    write: Write, pool: ForkPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it"
    run_command_here("sweep", str(write(TWO)), "--out", str(out))
    found = json.loads((out / "results.json").read_text())
    runs = table(out / "runs.csv")
    assert list(runs[0]) == list(RUN_COLUMNS)
    assert [(r["variant"], r["seed"]) for r in runs] == [
        ("bias", "3"), ("none", "3"), ("bias", "4"), ("none", "4")
    ]  # fmt: skip
    for row in runs:
        summary = json.loads(
            (out / "runs" / row["variant"] / f"seed-{row['seed']}" / "summary.json").read_text()
        )
        assert (
            float(row["value"]) == float(row["val_bits_per_byte"]) == summary["val_bits_per_byte"]
        )
        assert (row["state"], row["steps"], row["reason"], row["censored"]) == (
            "done",
            "2",
            "",
            "false",
        )
    variants = table(out / "variants.csv")
    assert list(variants[0]) == list(VARIANT_COLUMNS)
    for row, result in zip(variants, found["rows"], strict=True):
        assert float(row["mean"]) == result["mean"]
        assert row["n"] == row["runs"] == "2"
    assert variants[0]["difference"] == ""
    assert float(variants[1]["difference_low"]) == found["rows"][1]["difference"]["low"]


@pytest.mark.full
def test_points_and_what_is_left_out_are_in_the_table_of_variants(
    write: Write, pool: ForkPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it"
    run_command_here("sweep", str(write(GRID + RULE)), "--out", str(out))
    *kept, left = table(out / "variants.csv")
    assert [row["left_out"] for row in kept] == ["", "", ""]
    assert json.loads(kept[1]["point"]) == {"optimizer.lr": 0.001, "model.heads.mtp.depth": 2}
    assert (left["section"], left["left_out"], left["n"], left["mean"]) == (
        "a",
        "it diverges",
        "0",
        "",
    )
    assert "without interaction" in capsys.readouterr().out
