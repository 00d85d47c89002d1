"""Commands that run in this process and return what they printed."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import CommandResult, run_command_here

Command = Callable[..., CommandResult]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command by its name and arguments."""
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(name: str, *arguments: str | Path) -> CommandResult:
        capsys.readouterr()
        code = 0
        try:
            run_command_here(name, *arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capsys.readouterr()
        return CommandResult(code, printed.out, printed.err)

    return run
