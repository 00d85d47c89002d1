"""Runs of `core.fit` in processes of their own, several at once, and the results in their folders."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.analysis.budget import plan_of
from core.recipe.compose import compose
from core.run.data import text_data
from core.study.training_losses import losses_by_step

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20.0
"""Seconds that a process has to end by itself after an interrupt."""
TOTAL = "loss/total"
"""A column of `metrics.csv`."""


@dataclass(frozen=True)
class Process:
    """A process that was started, and the file that holds its output."""

    running: subprocess.Popen[bytes]
    log: Path
    began: float

    @classmethod
    def start(cls, arguments: list[str], log: Path, *, threads: int) -> "Process":
        """Starts Python with these arguments in the checkout."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            running = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return cls(running, log, time.monotonic())

    def wait(self, deadline: float) -> bool:
        """Whether it ends by itself before the deadline, on the clock `time.monotonic`."""
        with suppress(subprocess.TimeoutExpired):
            self.running.wait(max(0.1, deadline - time.monotonic()))
            return True
        return False

    def interrupt(self) -> None:
        """Interrupts the process as Ctrl-C does: a run then saves, and pytest writes its report."""
        if self.running.poll() is None:
            self.running.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Waits for the end of the process, and kills it after `GRACE` seconds."""
        if not self.wait(time.monotonic() + GRACE):
            self.running.kill()
            self.running.wait()

    def last_line(self) -> str:
        """The last line of the output, or the last error message of a command if there is one."""
        lines = [
            line.strip()
            for line in self.log.read_text("utf-8", "replace").splitlines()
            if line.strip()
        ]
        errors = [line.removeprefix("moeloom: ") for line in lines if line.startswith("moeloom: ")]
        return (errors or lines or ["it said nothing"])[-1][:500]


def stop(processes: Iterable[Process]) -> None:
    """Interrupts the processes that still run, all at once, and waits for their end."""
    processes = list(processes)
    for process in processes:
        process.interrupt()
    for process in processes:
        process.end()


class Fits:
    """Runs that go on at the same time; leaving the context ends them.

    Args:
        folder: receives the run folders, under the names of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, Process] = {}

    def __enter__(self) -> "Fits":
        return self

    def __exit__(self, *_: object) -> None:
        stop(self.processes.values())

    def start(self, name: str, recipe: str, overrides: list[str], *, threads: int) -> None:
        """Starts `python -m core.fit RECIPE KEY=VALUE ...`; the folder must be new."""
        quiet = [*overrides, "trainer.enable_progress_bar=false"]
        arguments = ["-m", "core.fit", recipe, *quiet, "--out", str(self.run(name))]
        self.processes[name] = Process.start(
            arguments, self.folder / f"{name}.log", threads=threads
        )

    def run(self, name: str) -> Path:
        """The run folder of that name."""
        return self.folder / name

    def results(self, seconds: float) -> dict[str, dict[str, Any]]:
        """The result of every run, once all have ended, or at most that many seconds after the last one began."""
        deadline = max(process.began for process in self.processes.values()) + seconds
        in_time = {name: process.wait(deadline) for name, process in self.processes.items()}
        stop(self.processes.values())
        return {
            name: self._result(name, process, in_time[name])
            for name, process in self.processes.items()
        }

    def _result(self, name: str, process: Process, in_time: bool) -> dict[str, Any]:
        code, steps = process.running.returncode, losses_by_step(self.run(name), TOTAL)
        found: dict[str, Any] = {"ended": "finished", "steps": len(steps)}
        if not in_time:
            found["ended"] = f"stopped after step {max(steps, default=0)}: the time was up"
        elif code:
            found |= {"ended": f"failed with exit code {code}", "error": process.last_line()}
        return found | {"summary": summary(self.run(name))}


def summary(run: Path) -> dict[str, Any]:
    """The content of `summary.json`; empty where the run did not write it."""
    with suppress(OSError, ValueError):
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    return {}


def prepare_data(recipe: str, overrides: list[str]) -> None:
    """Writes tokenizer and tokens into the cache, once for all runs."""
    made = compose(recipe, overrides)
    text_data(made, plan_of(made)).prepare()


def toy_text(folder: Path) -> list[str]:
    """Overrides for a dry run on the text of docs/, which is short, because validation reads all held-out text.

    Args:
        folder: receives copies of the text.
    """
    texts = (folder / "texts").resolve()
    texts.mkdir(parents=True, exist_ok=True)
    for page in sorted((ROOT / "docs").glob("*.md")):
        (texts / page.with_suffix(".txt").name).write_text(page.read_text("utf-8"), "utf-8")
    corpus = f"data.corpus={{name: files, paths: ['{texts}/*.txt']}}"
    return [corpus, "data.tokenizer.vocab=512", "data.sequence_length=64", "batch.sequences=2"]
