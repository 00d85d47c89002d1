"""The worker of `same_bits.py`: runs commands of one version of moeloom, one after the other, each in a forked process.

A forked process starts at once, because torch and Lightning are imported once, before the first fork. A command of
several ranks starts as a process of its own, because Lightning starts the other ranks by repeating its command line.
"""

import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TypedDict


class Command(TypedDict):
    """The command `python -m module arguments`.

    Args:
        name: the name of its log files.
        module: the module of a command of moeloom.
        arguments: its command-line arguments.
        processes: how many ranks it starts.
    """

    name: str
    module: str
    arguments: list[str]
    processes: int


def run_forked(command: Command, out: Path, err: Path) -> int:
    """Runs a command in a forked process with its output in two files; returns its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os._exit(_run_here(command, out, err))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _run_here(command: Command, out: Path, err: Path) -> int:
    """Runs a command in this process with its output in two files; returns its exit code."""
    with out.open("w", encoding="utf-8") as stdout, err.open("w", encoding="utf-8") as stderr:
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        sys.stdout = stdout
        sys.stderr = stderr
        sys.argv = [command["module"], *command["arguments"]]
        try:
            runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def run_process(command: Command, out: Path, err: Path) -> int:
    """Runs a command as a process of its own; returns its exit code."""
    line = [sys.executable, "-m", command["module"], *command["arguments"]]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        return subprocess.run(line, stdout=stdout, stderr=stderr, check=False).returncode


def main() -> None:
    """Runs the commands that a folder's `commands.json` lists; writes `exit_codes.json` and their logs there."""
    import lightning  # noqa: F401 - imported once, for every forked command
    import torch  # noqa: F401

    sys.path.remove(str(Path(__file__).resolve().parent))
    folder = Path(sys.argv[1])
    commands: list[Command] = json.loads((folder / "commands.json").read_text(encoding="utf-8"))
    (folder / "logs").mkdir(exist_ok=True)
    codes = {}
    for command in commands:
        stem = command["name"].replace("/", ".")
        run = run_forked if command["processes"] == 1 else run_process
        out = folder / "logs" / f"{stem}.out"
        err = folder / "logs" / f"{stem}.err"
        codes[command["name"]] = run(command, out, err)
    (folder / "exit_codes.json").write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    main()
