"""python benchmarks/startup.py [--runs N]: the seconds from a command to the first step of training, and of imports.

The command is `core.fit recipes/dsv3_small.yaml` with prepared data: a first run that is not counted prepares them. A
run has taken its first step when the first row of its metrics is in the file. Import times are those of Python's own
`-X importtime`, of one process. The result is written into records/speed/startup.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "records" / "speed"
TOP = 15
LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|( *)(\S+)")
"""A line of `-X importtime`: own and cumulative microseconds, depth, module."""

PATIENCE = 120.0


def environment() -> dict[str, str]:
    """The environment of a process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def first_step_seconds(recipe: str, overrides: list[str]) -> float:
    """Seconds from the start of `core.fit` to the first row of its metrics; the run is ended then."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "core.fit", recipe, *overrides, "--out", str(out)]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            while not _has_row(out / "metrics.csv"):
                spent = time.perf_counter() - began
                if process.poll() is not None or spent > PATIENCE:
                    process.kill()
                    sys.exit(f"the run took no step: {process.communicate()[1][-400:]}")
                time.sleep(0.005)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.communicate()


def _has_row(file: Path) -> bool:
    """Whether the first row of a run's metrics is written, below the names of the columns."""
    return file.exists() and file.read_bytes().count(b"\n") > 1


def import_seconds(module: str) -> list[tuple[str, float, float]]:
    """Every module that an import loads, with the seconds of its import and of its own code alone."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return parse_import_times(done.stderr)


def parse_import_times(printed: str) -> list[tuple[str, float, float]]:
    """The lines of `-X importtime` as (module, cumulative seconds, own seconds)."""
    found = []
    for own, whole, _, name in LINE.findall(printed):
        found.append((name, int(whole) / 1e6, int(own) / 1e6))
    return found


def by_package(modules: list[tuple[str, float, float]]) -> dict[str, float]:
    """The own seconds of all modules of each package, most first."""
    found: dict[str, float] = {}
    for name, _, own in modules:
        package = name.partition(".")[0]
        found[package] = found.get(package, 0.0) + own
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(runs: int, recipe: str, overrides: list[str]) -> dict[str, Any]:
    """The record."""
    first_step_seconds(recipe, overrides)  # prepares the data
    seconds = sorted(first_step_seconds(recipe, overrides) for _ in range(runs))
    modules = import_seconds("core.run.training")
    longest = sorted(modules, key=lambda row: -row[1])[:TOP]
    packages = by_package(modules)
    return {
        "recipe": recipe,
        "first_step_seconds": {"median": seconds[len(seconds) // 2], "all": seconds},
        "load_average": os.getloadavg()[0],
        "imported": "core.run.training",
        "import_seconds": sum(packages.values()),
        "longest_imports": [
            {"module": name, "seconds": whole, "own_seconds": own} for name, whole, own in longest
        ],
        "own_seconds_by_package": dict(list(packages.items())[:TOP]),
    }


def main() -> None:
    """Measures, writes the record and prints it."""
    p = argparse.ArgumentParser(
        prog="python benchmarks/startup.py", description="The time to the first step of training."
    )
    p.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "dsv3_small.yaml"))
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    p.add_argument("--runs", type=int, default=7, help="runs that are timed (7)")
    p.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: records/speed")
    arguments = p.parse_intermixed_args()
    if arguments.runs < 1:
        p.error("--runs must be at least 1")
    found = measure(arguments.runs, arguments.recipe, arguments.overrides)
    found["recipe"] = Path(arguments.recipe).name
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2) + "\n"
    (arguments.out / "startup.json").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
