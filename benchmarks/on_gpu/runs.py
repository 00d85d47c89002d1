"""Runs of `core.fit` in processes of their own, several at once, and what their folders tell."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.assemble import plan_of
from core.recipe.compose import compose
from core.run import text_data

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20.0
"""Seconds that a process has to leave by itself."""
TOTAL, NEXT_TOKEN = "loss/total", "loss/next_token"
"""Columns of `metrics.csv`."""


@dataclass(frozen=True)
class Process:
    """One that was started, and the file that holds what it says."""

    running: subprocess.Popen[bytes]
    log: Path
    began: float

    @classmethod
    def start(cls, arguments: list[str], log: Path, *, threads: int) -> "Process":
        """Python with these arguments, in the checkout."""
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
        """Whether it ended by itself before the deadline; else it is interrupted, and ended where that is not enough.

        Args:
            deadline: of `time.monotonic`.
        """
        with suppress(subprocess.TimeoutExpired):
            self.running.wait(max(0.1, deadline - time.monotonic()))
            return True
        self.stop()
        return False

    def stop(self) -> None:
        """As Ctrl-C would; a run then saves, and pytest writes its report."""
        if self.running.poll() is None:
            self.running.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.running.wait(GRACE)
        if self.running.poll() is None:
            self.running.kill()
            self.running.wait()

    def last_line(self) -> str:
        """Of what it said: a door's own sentence where there is one."""
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines() if line.strip()]
        told = [line.removeprefix("moeloom: ") for line in lines if line.startswith("moeloom: ")]
        return (told or lines or ["it said nothing"])[-1][:500]


class Fits:
    """Runs that go on at the same time; leaving the context ends those that still do.

    Args:
        folder: of their run folders, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, Process] = {}

    def __enter__(self) -> "Fits":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.stop()

    def start(self, name: str, recipe: str, overrides: list[str], *, threads: int) -> None:
        """`python -m core.fit RECIPE KEY=VALUE ...`; the folder must be new."""
        quiet = [*overrides, "trainer.enable_progress_bar=false"]
        arguments = ["-m", "core.fit", recipe, *quiet, "--out", str(self.run(name))]
        self.processes[name] = Process.start(arguments, self.folder / f"{name}.log", threads=threads)

    def run(self, name: str) -> Path:
        """Its run folder."""
        return self.folder / name

    def results(self, seconds: float) -> dict[str, dict[str, Any]]:
        """What every run came to, once all have ended or that long after the last one began."""
        deadline = max(process.began for process in self.processes.values()) + seconds
        return {name: self._result(name, process, deadline) for name, process in self.processes.items()}

    def _result(self, name: str, process: Process, deadline: float) -> dict[str, Any]:
        in_time = process.wait(deadline)
        code, steps = process.running.returncode, curve(self.run(name), TOTAL)
        found: dict[str, Any] = {"ended": "finished", "steps": len(steps)}
        if not in_time:
            found["ended"] = f"stopped after step {max(steps, default=0)}: the time was up"
        elif code:
            found |= {"ended": f"failed with exit code {code}", "error": process.last_line()}
        return found | {"summary": summary(self.run(name))}


def curve(run: Path, column: str) -> dict[int, float]:
    """A column of `metrics.csv` by step, without what is missing, not finite or half written."""
    found: dict[int, float] = {}
    with suppress(OSError), (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            with suppress(KeyError, TypeError, ValueError):
                step, value = int(float(row["step"])), float(row[column])
                if math.isfinite(value):
                    found[step] = value
    return found


def summary(run: Path) -> dict[str, Any]:
    """`summary.json`; empty where the run did not get there."""
    with suppress(OSError, ValueError):
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    return {}


def prepare_data(recipe: str, overrides: list[str]) -> None:
    """Tokenizer and tokens into the cache, once for all runs."""
    made = compose(recipe, overrides)
    text_data(made, plan_of(made)).prepare()
