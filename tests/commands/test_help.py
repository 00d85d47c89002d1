"""`--help` is quick: it answers with 0 before anything heavy is imported."""

import os
import subprocess
import sys
import time

import pytest
from lab import ROOT

DOORS = sorted(
    file.stem for file in (ROOT / "core").glob("*.py") if "run_door(" in file.read_text() and file.stem != "door"
)
HEAVY = ("torch", "lightning", "numpy", "omegaconf", "tokenizers", "rich", "yaml", "pluggy")
PROBE = """
import runpy, sys
name = sys.argv[1]
sys.argv = [name, "--help"]
try:
    runpy.run_module(name, run_name="__main__")
except SystemExit as leaving:
    heavy = [module for module in {heavy} if module in sys.modules]
    print("LEFT", leaving.code, *heavy)
"""


def test_the_commands_are_there() -> None:
    assert {"fit", "describe", "catalog", "generate", "evaluate"} <= set(DOORS)


@pytest.mark.parametrize("door", DOORS)
def test_help_imports_nothing_heavy(door: str) -> None:
    began = time.perf_counter()
    command = [sys.executable, "-c", PROBE.format(heavy=HEAVY), f"core.{door}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    print(f"python -m core.{door} --help: {time.perf_counter() - began:.2f} s")
    *usage, left = done.stdout.splitlines()
    assert left.split() == ["LEFT", "0"], left
    assert usage[0].startswith(f"usage: python -m core.{door} ")


@pytest.mark.parametrize("arguments", [(), ("--no-such-option", "recipe"), ("recipe", "--out")])
def test_a_command_that_cannot_be_read_leaves_with_2(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "core.fit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
