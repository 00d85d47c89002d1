"""The memory that a process, or a GPU, holds at most."""

from pathlib import Path

import torch

from core.training.host_memory import resident

CLEAR = Path("/proc/self/clear_refs")
PEAK_AGAIN = "5"
"""What resets a process's peak (proc(5), clear_refs)."""

PART = 0.5
"""The part of the free memory that a measurement may take."""


class PeakMemory:
    """The largest memory from now on, above what is held now.

    On a CPU it is the resident set of this process, on a GPU what torch has allocated.

    Args:
        device: where the model will be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        _reset_peak()
        self.before = resident()[0]

    def bytes(self) -> int:
        """The peak since, minus what was held before."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return resident()[1] - self.before


def _reset_peak() -> None:
    """Makes the peak begin here, where the system can."""
    if CLEAR.exists():
        CLEAR.write_text(PEAK_AGAIN)


def limit_memory() -> None:
    """Makes this process fail, rather than the machine, where it needs more than `PART` of the free memory.

    Linux only; torch then raises an error that names the memory.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    import resource

    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) * 1024
    allowed = int(free * PART)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        allowed = min(allowed, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
