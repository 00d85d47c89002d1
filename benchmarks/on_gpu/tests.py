"""Runs the tests that need a GPU: models against the fp64 reference, and every product of FP8."""

import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.on_gpu.measure import Lab, failed
from benchmarks.on_gpu.runs import Process, stop

TESTS = (
    "model/test_cuda.py",
    "model/test_decoding.py",
    "precision/test_cuda.py",
    "precision/test_native.py",
    "precision/test_native_kernels.py",
    "precision/test_te_gpu.py",
    "training/test_cuda_graph.py",
)
SECONDS = 420.0


def run(lab: Lab) -> dict[str, Any]:
    """Runs the tests in a process of their own."""
    with TemporaryDirectory() as scratch:
        process = start(Path(scratch))
        try:
            return outcome_of(process, Path(scratch))
        finally:
            stop([process])


def start(folder: Path) -> Process:
    """Starts pytest on the files that need a GPU."""
    files = [f"tests/{name}" for name in TESTS]
    report = [
        "-q",
        "-rfEs",
        "-p",
        "no:cacheprovider",
        f"--junitxml={folder.resolve() / 'tests.xml'}",
    ]
    tiers = ["-n", "0", "-m", "full or not full"]
    return Process.start(["-m", "pytest", *tiers, *report, *files], folder / "tests.log", threads=2)


def outcome_of(process: Process, folder: Path) -> dict[str, Any]:
    """Counts of outcomes, the errors of tests that failed, reasons of skipped ones, and what tests recorded."""
    in_time = process.wait(process.began + SECONDS)
    stop([process])
    found = junit(folder / "tests.xml")
    return found | {
        "ended": "finished" if in_time else "interrupted: the time was up",
        "said": process.last_line(),
    }


def junit(report: Path) -> dict[str, Any]:
    """The content of a JUnit report of pytest."""
    counts: Counter[str] = Counter(passed=0, failed=0, errors=0, skipped=0)
    broken, why, recorded = {}, Counter[str](), {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = next(
            (e for kind in ("failure", "error", "skipped") if (e := case.find(kind)) is not None),
            None,
        )
        kind = (
            "passed"
            if outcome is None
            else {"failure": "failed", "error": "errors"}.get(outcome.tag, outcome.tag)
        )
        counts[kind] += 1
        if outcome is not None and kind != "skipped":
            lines = (outcome.get("message") or outcome.text or "").strip().splitlines()
            broken[name] = lines[0][:300] if lines else ""
        elif outcome is not None:
            why[outcome.get("message", "")[:200]] += 1
        recorded |= {p.get("name"): p.get("value") for p in case.iter("property")}
    return {**counts, "broken": broken, "skipped_because": dict(why), "recorded": recorded}


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table: counts, and the tests that failed."""
    if sentence := failed(found):
        return [("reference tests", sentence)]
    counted = ", ".join(
        f"{found[kind]} {kind}" for kind in ("passed", "failed", "errors", "skipped")
    )
    return [
        ("reference tests", counted),
        *((f"  {name}", why) for name, why in found["broken"].items()),
    ]
