"""Random damages of runs, checkpoints, caches and recipes: every command works as before, or says why in a sentence.

A failure prints the seed of its damage. `MOELOOM_FUZZ_SEED=N python -m pytest tests/fuzz -m full -k NAME`, with the
name of the failed test, begins with that one.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from lab import CommandResult

from fuzz.damages import damage
from fuzz.subjects import (
    CACHES,
    COMMANDS,
    QUICK,
    Command,
    Subjects,
    contents,
    draw_command,
    faults,
    run_as_process,
    run_here,
)

FEW = 40
MANY = 510
REFUSED = 0.2
"""Fraction of the damages that at least must end in a sentence: otherwise they are too small to test anything."""

WORKING = 0.2
"""Fraction of the damages after which at least a command must work: otherwise they are too large."""


@pytest.fixture(scope="module")
def subjects(lab: object, tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """The whole folders; they share the cache of the lab."""
    return Subjects(tmp_path_factory.mktemp("subjects"))


def damage_once(
    subjects: Subjects,
    scratch: Path,
    seed: int,
    run: Callable[[Sequence[str]], CommandResult] = run_here,
    commands: Sequence[Command] = COMMANDS,
) -> tuple[int, list[str]]:
    """Damages a copy of a folder and runs a command on it; returns its exit code and its faults."""
    draw = random.Random(seed)
    command = draw_command(draw, commands)
    expected = subjects.output_of(command, scratch) if command.same_output else None
    with subjects.copy(command, scratch) as (copy, arguments):
        done = damage(copy, draw)
        print(f"seed {seed}: {' '.join(command.arguments)}: {done}")
        before = contents(copy)
        result = run(arguments)
        found = faults(command, result, before, contents(copy))
        if expected is not None and result.code == 0 and result.out != expected:
            found.append(f"prints {result.out!r}, and {expected!r} on the whole folder")
    where = f"seed {seed}: {' '.join(command.arguments)}: {done}"
    return result.code, [f"{where}: {', '.join(found)}\n{result.err[-1500:]}"] if found else []


def damage_many(
    subjects: Subjects,
    scratch: Path,
    seeds: range,
    commands: Sequence[Command] = COMMANDS,
    run: Callable[[Sequence[str]], CommandResult] = run_here,
    *,
    refused: float = REFUSED,
    working: float = WORKING,
) -> None:
    """Runs all seeds, and prints how many damages were survived and how many were explained."""
    began = time.monotonic()
    codes: Counter[int] = Counter()
    failures = []
    for seed in seeds:
        code, found = damage_once(subjects, scratch, seed, run, commands)
        codes[code] += 1
        failures += found
    seconds = time.monotonic() - began
    print(f"{len(seeds)} damages in {seconds:.0f} s: {codes[0]} work, {codes[2]} in a sentence")
    assert not failures, f"{len(failures)} of {len(seeds)}:\n" + "\n".join(failures)
    assert codes[2] >= refused * len(seeds)
    assert codes[0] >= working * len(seeds)


def seeds(default: int, count: int) -> range:
    """Seeds from a first one, which the environment may give."""
    first = int(os.environ.get("MOELOOM_FUZZ_SEED", default))
    return range(first, first + count)


def test_forty_damages_end_in_a_sentence(subjects: Subjects, tmp_path: Path) -> None:
    damage_many(subjects, tmp_path / "scratch", seeds(0, FEW), QUICK)


def test_hundreds_of_damages_end_in_a_sentence(subjects: Subjects, tmp_path: Path) -> None:
    damage_many(subjects, tmp_path / "scratch", seeds(1000, MANY))


def test_forty_damages_of_a_cache_are_made_good(subjects: Subjects, tmp_path: Path) -> None:
    """Damaged data are prepared again, or are an error: no command goes on with other tokens."""
    scratch = tmp_path / "scratch"
    damage_many(subjects, scratch, seeds(2000, FEW), CACHES, refused=0.0, working=0.8)


def test_twenty_damages_by_real_commands(subjects: Subjects, tmp_path: Path) -> None:
    damage_many(subjects, tmp_path / "scratch", seeds(100, 20), run=run_as_process)
