"""The number of cores that this process may use: those it may run on, limited by a container's quota."""

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of all cores together in a period, and the period; `max` if there is no quota (cgroup v2)."""


def cores() -> int:
    """The number of usable cores, rounded down to a whole number of at least 1."""
    free = len(os.sched_getaffinity(0))
    try:
        quota, period = map(int, QUOTA.read_text(encoding="utf-8").split())
    except (OSError, ValueError):  # another system, or no quota
        return free
    return max(1, min(free, quota // period))
