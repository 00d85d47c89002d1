"""Memory that a training process has freed is not faulted in again."""

import subprocess
import sys

import pytest

from core.training import host_memory

SCRIPT = """
import resource, sys
from core.training.host_memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def touch():
    block = bytearray(64 << 20)
    for i in range(0, len(block), 4096):
        block[i] = 1
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def second_time(what: str) -> tuple[bool, int]:
    """Whether the setting was taken, and the page faults when 64 MB are allocated for the second time."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, check=True, timeout=60
    )
    kept, faults = done.stdout.split()
    return kept == "1", int(faults)


def test_the_peak_of_a_program_is_not_that_of_its_parent() -> None:
    """Linux passes the peak of `getrusage` on to the program that a process becomes."""
    held = bytearray(b"x") * (300 << 20)
    script = "from core.training.host_memory import resident; print(*resident())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    now, peak = map(int, done.stdout.split())
    assert 0 < now <= peak < len(held)


def test_freed_memory_is_used_again() -> None:
    kept, faults = second_time("keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    assert faults < 100
    assert second_time("plain")[1] > 10_000


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_stay_as_they_are(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert host_memory.keep_freed_memory() is False
