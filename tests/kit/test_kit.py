"""The conformance kit accepts the built-in plugins, and each broken plugin fails its own check."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from broken_plugins import BROKEN
from tiers import first_by_default

from core.extension.loader import find_plugins, load_plugins
from core.testing.clauses import CHECKS, BrokenClauseError, NotApplicable
from core.testing.run import Case, cases, cases_of
from core.testing.subject import Subject

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = load_plugins([owner for owner in find_plugins() if owner.distribution == "moeloom"])
OWN = [entry for entries in REGISTRY.entries.values() for entry in entries]
CASES = [
    Case(Subject(entry, REGISTRY), check)
    for entry in OWN
    for check in CHECKS
    if entry.slot in check.slots
]


SLOW = ("compiles_as_declared", "loads_are_exact")
"""Clauses that the default tier checks for one component of each slot; they take half of the kit's time."""


SLOW_PARTS = ("hf_dataset",)
"""Components that import a large library."""


def slow_ones_once_by_default() -> list[Any]:
    """The cases; the tier `full` has those of `SLOW` beyond the first of a slot, and those of `SLOW_PARTS`."""
    seen = set()
    parameters = []
    for case in CASES:
        key = (case.check.name, case.subject.entry.slot)
        is_repeated = case.check.name in SLOW and key in seen
        seen.add(key)
        is_slow = is_repeated or case.subject.entry.name in SLOW_PARTS
        parameters.append(pytest.param(case, marks=[pytest.mark.full] if is_slow else []))
    return parameters


@pytest.mark.parametrize("case", slow_ones_once_by_default(), ids=lambda case: case.name)
def test_our_own_plugins_keep_their_contracts(case: Case) -> None:
    try:
        case.run()
    except NotApplicable as why:
        pytest.skip(str(why))


@pytest.mark.parametrize(
    "case", first_by_default(cases("own_parts"), keep=0), ids=lambda case: case.name
)
def test_parts_with_losses_tallies_and_metrics_of_their_own_keep_their_contracts(
    case: Case,
) -> None:
    """Checks an attention and a dense layer that return records, and a balancer that reads its tallies."""
    try:
        case.run()
    except NotApplicable as why:
        pytest.skip(str(why))


def test_every_slot_with_a_contract_is_checked() -> None:
    """Requires a check for each slot in addition to those that all slots share."""
    from core.extension.registry import SLOTS

    common = {"component_can_be_built", "config_is_honest", "example_is_complete"}
    checked = {slot for check in CHECKS if check.name not in common for slot in check.slots}
    assert checked == set(SLOTS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_where_a_clause_is_written_there_is_something() -> None:
    for check in CHECKS:
        for place in check.where.split("; "):
            file, _, rest = place.partition(", ")
            text = (ROOT / file).read_text(encoding="utf-8")
            name = rest.partition(":")[0].strip()
            assert not name or name in text, f"{check.name}: {place}"


@pytest.mark.parametrize(("slot", "name"), first_by_default(BROKEN, keep=8, several=True))
def test_a_broken_plugin_fails_exactly_its_check(slot: str, name: str) -> None:
    failed = {}
    for case in cases("broken_plugins"):
        if (case.subject.entry.slot, case.subject.entry.name) == (slot, name):
            try:
                case.run()
            except NotApplicable:
                continue
            except BrokenClauseError as error:
                failed[case.check.name] = str(error)
    assert list(failed) == [BROKEN[slot, name]], failed
    (message,) = failed.values()
    assert f"{slot} {name!r} (broken_plugins:" in message
    assert "\n  clause:  " in message
    assert "\n  written: core/" in message or "\n  written: docs/" in message


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest in a process of its own, in a folder without tests."""
    installed = any(
        point.value == "core.testing.plugin" for point in entry_points(group="pytest11")
    )
    named = [] if installed else ["-p", "core.testing.plugin"]
    command = [sys.executable, "-m", "pytest", *named, "-p", "no:cacheprovider", *arguments]
    environment = {
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.full
def test_the_option_runs_the_kit_and_says_what_is_broken(tmp_path: Path) -> None:
    good = run_pytest(tmp_path, "--moeloom-plugin", "plugins.z_loss")
    assert good.returncode == 0, good.stdout
    assert "passed" in good.stdout
    bad = run_pytest(tmp_path, "--moeloom-plugin", "broken_plugins", "-k", "narrow")
    assert bad.returncode == 1
    assert "1 failed" in bad.stdout
    assert "breaks a clause of its contract" in bad.stdout
    assert "autocast changes" in bad.stdout
    assert "Traceback" not in bad.stdout


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A plugin package that is not installed, with tests in its project; it registers what z_loss registers."""
    package = tmp_path / "project" / "my_plugin"
    package.mkdir(parents=True)
    source = (ROOT / "plugins" / "z_loss" / "__init__.py").read_text(encoding="utf-8")
    (package / "__init__.py").write_text(source, encoding="utf-8")
    (tmp_path / "project" / "tests").mkdir()
    (tmp_path / "project" / "tests" / "test_own.py").write_text("def test_own(): pass\n")
    return package


@pytest.mark.full
def test_the_option_runs_the_kit_alone_from_any_folder_and_named_paths_beside_it(
    own_folder: Path,
) -> None:
    project = own_folder.parent
    for folder, paths, own in (
        (project, [], 0),
        (own_folder, [], 0),
        (project / "tests", [], 0),
        (project, ["tests"], 1),
    ):
        result = run_pytest(
            folder, "--moeloom-plugin", "my_plugin", "-k", "own or needs", "-v", *paths
        )
        assert result.returncode == 0, result.stdout
        assert result.stdout.count("test_own PASSED") == own, result.stdout
        assert "needs_are_known" in result.stdout


@pytest.mark.full
def test_in_the_repositorys_root_the_option_does_not_run_the_repositorys_tests() -> None:
    result = run_pytest(ROOT, "--moeloom-plugin", "plugins.z_loss", "--collect-only", "-q")
    assert result.returncode == 0, result.stdout
    collected = [line for line in result.stdout.splitlines() if "::" in line]
    assert collected
    assert not [line for line in collected if line.startswith("tests/")]


@pytest.mark.full
def test_a_package_that_is_no_plugin_is_one_sentence(tmp_path: Path) -> None:
    for package, why in (
        ("no_such_package", "No module named 'no_such_package'"),
        ("json", "implements no hook"),
    ):
        result = run_pytest(tmp_path, "--moeloom-plugin", package)
        assert result.returncode == 2
        assert why in result.stdout
        assert "Traceback" not in result.stdout


def test_the_kit_costs_nothing_where_it_is_not_asked_for(tmp_path: Path) -> None:
    probe = "import sys, core.testing.plugin; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_one_entry_can_be_held_by_a_call() -> None:
    entry = REGISTRY.find("balancer", "z_loss")
    assert len(cases_of(entry, "plugins.z_loss")) >= 15
