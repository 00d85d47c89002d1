"""Sweeps of the small recipe, and a pool that forks: it starts runs in no time."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from lab import Lab, forked, run_command_here

import core.study.sweep
from core.study.child import exit_on_full_disk
from core.study.sweep_folder import Job

Write = Callable[[str], Path]

TWO = """\
title: Does the bias help?
base: {base}
seeds: [3, 4]
baseline: bias
variants:
  bias: {{}}
  none: {{overrides: {{model.blocks.moe.ffn.balance: []}}}}
budget: {{steps: 2}}
"""


class ForkPool:
    """`core.fit` in a forked process for each run, one after the other."""

    slots = 1

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Runs it here and now."""
        self.commands.append(command)
        result = forked(lambda: _fit(command[3:]))
        with job.log.open("a", encoding="utf-8") as log:
            log.write(result.out + result.err)
        future: Future[tuple[int, float]] = Future()
        future.set_result((result.code, 1.0))
        return future

    def stop(self) -> None:
        """Nothing is under way."""


def _fit(arguments: list[str]) -> None:
    """Runs `core.fit` like `core.study.child`, with its exit code for a full disk."""
    with exit_on_full_disk():
        run_command_here("fit", *arguments)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> ForkPool:
    """A pool of forked processes that replaces the real one."""
    fork_pool = ForkPool()
    monkeypatch.setattr(core.study.sweep, "_pool", lambda *_: fork_pool)
    return fork_pool


@pytest.fixture
def write(lab: Lab, tmp_path: Path) -> Write:
    """Writes a sweep file; `{base}` in it is the small recipe."""

    def to_file(text: str) -> Path:
        file = tmp_path / "question.yaml"
        file.write_text(text.format(base=lab.file), encoding="utf-8")
        return file

    return to_file
