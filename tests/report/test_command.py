"""`python -m core.report`: what it writes and prints, and its errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import first_by_default

from core import report
from core.command import run_command
from core.reports.study_files import Run
from core.reports.table import key_numbers

pytest.importorskip("pandas", reason="the extra `report` is not installed")
pytest.importorskip("plotly", reason="the extra `report` is not installed")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["core/report.py", *map(str, arguments)])
    try:
        run_command(report.main, report.parser())
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_the_report_is_written_into_the_folder_unless_out_names_another_place(
    single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, single) == 0
    assert capsys.readouterr().out.startswith(f"{single / 'report.html'} (")
    assert command(monkeypatch, single, "--out", tmp_path / "it.html") == 0
    assert (tmp_path / "it.html").read_text().startswith("<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["it.html"]


def test_json_is_one_document(
    under_way: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "it.html"
    assert command(monkeypatch, under_way, "--out", file, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    states = {"runs": 12, "done": 8, "failed": 1, "running": 1, "interrupted": 0, "waiting": 2}
    assert document == {"file": str(file), "kind": "sweep", "bytes": file.stat().st_size, **states}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda folder: folder / "none",
            "there is no such folder; name a run folder or a sweep folder",
        ),
        (
            lambda folder: folder,
            "neither a run (no recipe.yaml) nor a sweep (no sweep.json) is in this folder",
        ),
    ],
    ids=["missing", "empty"],
)
def test_what_is_no_run_and_no_sweep_is_refused(
    make: object,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    assert command(monkeypatch, folder) == 2
    assert capsys.readouterr().err == f"moeloom: {folder}: {sentence}\n"


def test_a_place_that_cannot_be_written_is_refused(
    single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, single, "--out", tmp_path / "none" / "it.html") == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_a_missing_extra_is_reported(
    single: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert command(monkeypatch, single) == 2
    assert capsys.readouterr().err == (
        "moeloom: a report needs plotly, not installed here: pip install 'moeloom[report]'\n"
    )


PROBE = """
import sys
sys.argv = ["core/report.py", {arguments}]
from core import report
from core.command import run_command
try:
    run_command(report.main, report.parser())
except SystemExit:
    pass
print(sorted({{"torch", "lightning", "plotly", "pandas", "numpy", "jinja2"}} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("what", ["help", "report"])
def test_help_imports_nothing_heavy_and_a_report_no_torch(
    what: str, single: Path, tmp_path: Path
) -> None:
    arguments = (
        "'--help'" if what == "help" else f"{str(single)!r}, '--out', {str(tmp_path / 'it.html')!r}"
    )
    command = [sys.executable, "-c", PROBE.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    imported = [] if what == "help" else ["jinja2", "numpy", "pandas", "plotly"]
    assert done.stderr.strip().splitlines()[-1] == str(imported)


@pytest.mark.parametrize(
    ("name", "text"),
    first_by_default(
        [
            ("recipe.yaml", "a: " + "[" * 5000 + "]" * 5000),
            ("provenance.json", '{"components": 3, "gpus": {}, "command": [1], "odd": "\\ud800"}'),
            ("provenance.json", "[" * 90_000),
            ("summary.json", '{"val_loss": {"a": [1]}, "notices": "none"}'),
        ],
        several=True,
    ),
)
def test_a_run_with_an_odd_file_has_a_report(
    single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(single, run)
    (run / name).write_text(text)
    assert command(monkeypatch, run, "--out", tmp_path / "it.html") == 0, capsys.readouterr().err
    assert (tmp_path / "it.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_section_of_the_summary_is_counted_and_not_printed_as_a_dictionary() -> None:
    paths = {"router": "float32 product", "head": "float32 product", "experts": "FP8"}
    run = Run("a", 0, Path("a"), "done", summary={"precision_paths": paths})
    assert key_numbers(run) == [("precision_paths", "float32 product (2); FP8 (1)")]
