"""Random damages of runs, checkpoints, caches and recipes: every command works as before, or says why in a sentence.

A failure prints the seed of its damage, which `MOELOOM_FUZZ_SEED=N python -m pytest tests/fuzz -m full -k hundreds`
repeats first.
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
    with subjects.copy(command, scratch) as (copy, arguments):
        done = damage(copy, draw)
        print(f"seed {seed}: {' '.join(command.arguments)}: {done}")
        before = contents(copy)
        result = run(arguments)
        found = faults(command, result, before, contents(copy))
    where = f"seed {seed}: {' '.join(command.arguments)}: {done}"
    return result.code, [f"{where}: {', '.join(found)}\n{result.err[-1500:]}"] if found else []


def damage_many(
    subjects: Subjects, scratch: Path, seeds: range, commands: Sequence[Command]
) -> None:
    """Runs all seeds, and prints how many damages were survived and how many were explained."""
    began = time.monotonic()
    codes: Counter[int] = Counter()
    failures = []
    for seed in seeds:
        code, found = damage_once(subjects, scratch, seed, commands=commands)
        codes[code] += 1
        failures += found
    seconds = time.monotonic() - began
    print(f"{len(seeds)} damages in {seconds:.0f} s: {codes[0]} work, {codes[2]} in a sentence")
    assert not failures, f"{len(failures)} of {len(seeds)}:\n" + "\n".join(failures)


def test_forty_damages_end_in_a_sentence(subjects: Subjects, tmp_path: Path) -> None:
    damage_many(subjects, tmp_path / "scratch", range(FEW), QUICK)


def test_hundreds_of_damages_end_in_a_sentence(subjects: Subjects, tmp_path: Path) -> None:
    first = int(os.environ.get("MOELOOM_FUZZ_SEED", "1000"))
    damage_many(subjects, tmp_path / "scratch", range(first, first + MANY), COMMANDS)


def test_twenty_damages_by_real_commands(subjects: Subjects, tmp_path: Path) -> None:
    failures = []
    for seed in range(100, 120):
        _, found = damage_once(subjects, tmp_path / "scratch", seed, run_as_process)
        failures += found
    assert not failures, "\n".join(failures)
