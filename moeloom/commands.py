"""`moeloom NAME ...` runs the command `python -m core.NAME ...`; without a name it lists the commands."""

import argparse
import ast
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import core
from core.command import leave, run_command
from core.contracts.errors import nearest

HELP = """\
usage: moeloom COMMAND ...

Train small DeepSeek-V3-style language models, swap any of their parts, and measure what that changes.

commands:
{commands}

`moeloom COMMAND --help` prints the arguments of a command; `moeloom --version` prints the version.
"""


def run(arguments: list[str]) -> None:
    """Runs a command as `python -m core.NAME` does, with the same exit codes.

    Args:
        arguments: the name of the command, then its own arguments.
    """
    first, *rest = arguments or ["--help"]
    names = command_names()
    if first in ("-h", "--help"):
        print(HELP.format(commands="\n".join(map(_summary, names))), end="")
    elif first == "--version":
        print(f"moeloom {core.__version__}")
    elif first in names:
        _run_command(first, rest)
    else:
        leave(2, f"unknown command {first!r}; {nearest(first, names)}")


def command_names() -> list[str]:
    """Returns the names of the modules of `core` that are commands: those that define `main` and `parser`.

    The modules are read, not imported, because importing one that is not a command may import torch.
    """
    return [file.stem for file in sorted(Path(*core.__path__).glob("*.py")) if _is_command(file)]


def _is_command(file: Path) -> bool:
    statements = ast.parse(file.read_text(encoding="utf-8")).body
    functions = {
        statement.name for statement in statements if isinstance(statement, ast.FunctionDef)
    }
    return {"main", "parser"} <= functions


def _summary(name: str) -> str:
    """Returns a line about a command: its name, and its description up to a colon or semicolon."""
    description = str(_module(name).parser().description)
    first_clause = re.split("[:;]", description)[0].rstrip(".")
    return f"  {name:14}{first_clause}"


def _module(name: str) -> ModuleType:
    return import_module(f"core.{name}")


def _run_command(name: str, arguments: list[str]) -> None:
    """Makes this process equal to `python -m core.NAME`, but for the program's name in usage lines.

    Run folders record `sys.argv`, and Lightning starts further ranks by the name of the main module.
    """
    module = _module(name)
    parser = module.parser()
    _rename(parser, parser.prog, f"moeloom {name}")
    sys.argv = [str(module.__file__), *arguments]
    sys.modules["__main__"].__spec__ = module.__spec__
    run_command(module.main, parser)


def _rename(parser: argparse.ArgumentParser, before: str, after: str) -> None:
    """Replaces the program's name in a parser and in the parsers of its subcommands."""
    parser.prog = parser.prog.replace(before, after, 1)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _rename(subparser, before, after)
