"""What is damaged: whole folders of every kind, each with the commands that read it."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from interop.checkpoints import V3, tensors_of
from lab import ROOT, SMALL, CommandResult, run_command_here, write_texts
from report.synthetic import Made, write_sweep
from safetensors.torch import save_file

from core.checkpoints.listing import remove_checkpoint

TIMEOUT = 60
"""Seconds after which a command counts as hanging."""


class Hung(BaseException):
    """A command did not end."""


@dataclass(frozen=True)
class Command:
    """A command on a damaged folder.

    Args:
        subject: the name of the folder.
        arguments: of the command, in which FOLDER stands for the damaged copy and NEW for a path that is free.
        changes: names that begin the files which the command may change if it succeeds.
        weight: how often it is drawn.
        same_output: whether it must print what it prints on the whole folder, if it succeeds.
    """

    subject: str
    arguments: tuple[str, ...]
    changes: tuple[str, ...] = ()
    weight: int = 1
    same_output: bool = False


RUN = ("metrics.csv", "loads.safetensors", "checkpoints", "summary.json", "sample.txt")
COMMANDS = [
    Command("stopped", ("fit", "RECIPE", "--resume", "FOLDER"), (*RUN, "tensorboard"), 5),
    Command("stopped", ("report", "FOLDER", "--out", "NEW"), (), 1),
    Command("stopped", ("evaluate", "FOLDER"), (), 1),
    Command("done", ("fit", "RECIPE", "--resume", "FOLDER"), (*RUN, "tensorboard"), 2),
    Command("done", ("evaluate", "FOLDER", "--json"), (), 2),
    Command("done", ("generate", "FOLDER", "--prompt", "abc", "--tokens", "2"), (), 2),
    Command("done", ("report", "FOLDER", "--out", "NEW"), (), 2),
    Command("done", ("placement", "FOLDER", "--json"), (), 1),
    Command("done", ("convert", "to-hf", "FOLDER", "NEW"), (), 2),
    Command("done", ("describe", "FOLDER/recipe.yaml"), (), 1),
    Command("sharded", ("fit", "RECIPE", "--resume", "FOLDER"), (*RUN, "tensorboard"), 4),
    Command("sharded", ("generate", "FOLDER", "--prompt", "abc", "--tokens", "2"), (), 2),
    Command("sharded", ("convert", "to-hf", "FOLDER", "NEW"), (), 2),
    Command("hf", ("convert", "from-hf", "FOLDER", "NEW"), (), 5),
    Command("converted", ("convert", "to-hf", "FOLDER", "NEW"), (), 3),
    Command("converted", ("generate", "FOLDER", "--prompt", "a", "--tokens", "2"), (), 2),
    Command("converted", ("report", "FOLDER", "--out", "NEW"), (), 1),
    Command("cache", ("evaluate", "DONE", "--json"), ("",), 3, same_output=True),
    Command("cache", ("fit", "RECIPE", "--out", "NEW"), ("",), 1),
    Command("study", ("report", "FOLDER", "--out", "NEW"), (), 3),
    Command("recipe", ("describe", "FOLDER/small.yaml"), (), 3),
    Command("recipe", ("fit", "FOLDER/small.yaml", "--dry-run"), (), 2),
    Command("recipe", ("sweep", "FOLDER/sweep.yaml", "--dry-run"), (), 2),
]

CACHES = [c for c in COMMANDS if c.subject == "cache"]
"""The commands that read prepared data."""

QUICK = [
    c
    for c in COMMANDS
    if c.subject not in ("stopped", "sharded")
    and c.arguments[0] != "report"
    and (c.subject, c.arguments[0]) != ("cache", "fit")
]
"""The commands that neither train nor write a report."""

SWEEP = """\
title: two rates
base: small.yaml
seeds: [0, 1]
baseline: low
variants:
  low: {overrides: {optimizer.lr: 0.001}}
  high: {overrides: {optimizer.lr: 0.002}}
budget: {steps: 2}
"""


class Subjects:
    """The folders, whole; made once.

    Args:
        folder: where they are made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._outputs: dict[Command, str] = {}
        write_texts(folder / "texts")
        self.recipe = folder / "recipe" / "small.yaml"
        self.recipe.parent.mkdir()
        text = SMALL.format(texts=folder / "texts")
        text = text.replace("steps: 12", "steps: 3").replace("every_steps: 5", "every_steps: 2")
        text = text.replace("every_steps: 6", "every_steps: 3").replace(
            "accumulate: 2", "accumulate: 1"
        )
        self.recipe.write_text(text, encoding="utf-8")
        (folder / "recipe" / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
        done = folder / "done"
        self._run("fit", str(self.recipe), "--out", str(done))
        stopped = folder / "stopped"
        shutil.copytree(done, stopped)
        for name in ("summary.json", "sample.txt", "checkpoints/step-00000003.ckpt"):
            (stopped / name).unlink()
        sharded = folder / "sharded"
        one = "strategy={name: fsdp, ranks: 1}"
        self._run("fit", str(self.recipe), "--out", str(sharded), one)
        remove_checkpoint(sharded / "checkpoints" / "step-00000003.ckpt")
        for name in ("summary.json", "sample.txt"):
            (sharded / name).unlink()
        self._write_hf(folder / "hf")
        self._run("convert", "from-hf", str(folder / "hf"), str(folder / "converted"))
        write_sweep(folder / "study", {"a": Made(20), "b": Made(20, 4.3)}, [0, 1])
        shutil.copytree(os.environ["MOELOOM_CACHE"], folder / "cache")

    def output_of(self, command: Command, scratch: Path) -> str:
        """What a command prints on the whole folder; run once for each command."""
        if command not in self._outputs:
            with self.copy(command, scratch) as (_, arguments):
                self._outputs[command] = run_here(arguments).out
        return self._outputs[command]

    def _run(self, *arguments: str) -> None:
        result = run_here(arguments)
        assert result.code == 0, result.err

    def _write_hf(self, hf: Path) -> None:
        hf.mkdir()
        config = V3 | {"num_hidden_layers": 2}
        tensors = tensors_of(config)
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[::2]}
        parts["model-00002-of-00002.safetensors"] = names[1::2]
        weight_map = {}
        for file, part in parts.items():
            save_file({name: tensors[name].contiguous() for name in part}, hf / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (hf / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (hf / "config.json").write_text(json.dumps(config), encoding="utf-8")
        generation = {"bos_token_id": 0, "eos_token_id": [1]}
        (hf / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        shutil.copyfile(self.folder / "done" / "tokenizer.json", hf / "tokenizer.json")

    @contextmanager
    def copy(self, command: Command, scratch: Path) -> Iterator[tuple[Path, list[str]]]:
        """A copy of the command's folder, and the command's arguments on it; removed afterwards."""
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        copy = scratch / command.subject
        shutil.copytree(self.folder / command.subject, copy, symlinks=True)
        places = {
            "FOLDER": str(copy),
            "NEW": str(scratch / "new"),
            "RECIPE": str(self.recipe),
            "DONE": str(self.folder / "done"),
        }
        arguments = []
        for argument in command.arguments:
            for name, place in places.items():
                argument = argument.replace(name, place)
            arguments.append(argument)
        cache = copy if command.subject == "cache" else self.folder / "cache"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOELOOM_CACHE", str(cache))
            yield copy, arguments


def draw_command(draw: random.Random, commands: Sequence[Command] = COMMANDS) -> Command:
    """A command, drawn by the weights."""
    return draw.choices(commands, [command.weight for command in commands])[0]


def run_here(arguments: Any) -> CommandResult:
    """Runs a command in this process; one that does not end raises `Hung`."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0

    def hung(signum: int, frame: FrameType | None) -> None:
        raise Hung(" ".join(arguments))

    argv = sys.argv
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(TIMEOUT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command_here(*arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.argv = argv
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return CommandResult(code, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder by name: the bytes of files, the targets of links, the kind of the rest."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = os.readlink(path)
        elif stat.S_ISREG(mode):
            found[name] = path.read_bytes()
        else:
            found[name] = stat.S_IFMT(mode)
    return found


def faults(
    command: Command, result: CommandResult, before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[str]:
    """What is wrong about a command's end: neither success nor one sentence, or something was lost."""
    found = []
    lines = [line for line in result.err.splitlines() if line.startswith("moeloom: ")]
    sentences = [line for line in lines if not line.startswith("moeloom: warning: ")]
    if "Traceback" in result.err:
        found.append("a traceback")
    if result.code not in (0, 2):
        found.append(f"exit code {result.code}")
    if result.code == 2 and len(sentences) != 1:
        found.append(f"{len(sentences)} sentences")
    changes = command.changes if result.code == 0 or command.subject == "cache" else ()
    for name, content in before.items():
        if after.get(name) != content and not name.startswith(changes or "\0"):
            found.append(f"{name} has changed")
    left = [name for name in after if name not in before and not name.startswith("tensorboard")]
    if result.code and left and command.subject != "cache":
        found.append(f"left behind: {left}")
    return found


def run_as_process(arguments: Sequence[str]) -> CommandResult:
    """Runs a command as a process of its own."""
    command = [sys.executable, "-m", f"core.{arguments[0]}", *arguments[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)
