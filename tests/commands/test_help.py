"""`--help` is quick: it answers with 0 before anything heavy is imported."""

import os
import subprocess
import sys
import time

import pytest
from lab import ROOT

COMMANDS = sorted(
    file.stem
    for file in (ROOT / "core").glob("*.py")
    if "run_command(" in file.read_text() and file.stem != "command"
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
    assert {"fit", "describe", "catalog", "generate", "evaluate"} <= set(COMMANDS)


@pytest.mark.parametrize("name_of_command", COMMANDS)
def test_help_imports_nothing_heavy(name_of_command: str) -> None:
    began = time.perf_counter()
    command = [sys.executable, "-c", PROBE.format(heavy=HEAVY), f"core.{name_of_command}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    print(f"python -m core.{name_of_command} --help: {time.perf_counter() - began:.2f} s")
    *usage, left = done.stdout.splitlines()
    assert left.split() == ["LEFT", "0"], left
    assert usage[0].startswith(f"usage: python -m core.{name_of_command} ")


@pytest.mark.parametrize("arguments", [(), ("--no-such-option", "recipe"), ("recipe", "--out")])
def test_a_command_that_cannot_be_read_leaves_with_2(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "core.fit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
