"""The memory that this process holds, and how its allocator treats freed memory.

glibc gives large blocks back to the operating system as soon as they are freed, and the pages of the next block are
faulted in and cleared again. A training step frees and takes the same gigabytes every time.
"""

import ctypes
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
"""What Linux says about this process (proc(5))."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
"""Numbers of the options in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for its next allocations, where its C library is glibc.

    No block is mapped by itself any more, and the end of the heap is never given back (mallopt(3)). A process then
    holds its peak until it ends; no number changes.

    Returns:
        Whether the C library took both settings; False on systems without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def resident() -> tuple[int, int]:
    """The bytes of this process in memory, now and at most; where only the peak is known, it twice.

    On Linux the peak is that of the program that runs. `getrusage` would also count what the process held before it
    became this program: a copy of its parent (getrusage(2), "ru_maxrss").
    """
    if STATUS.exists():
        found = {}
        for line in STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                found[name] = int(value.split()[0]) * 1024
        return found["VmRSS"], found["VmHWM"]
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, peak
