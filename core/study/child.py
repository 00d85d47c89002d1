"""python -m core.study.child ...: `core.fit` that stops once when its runner dies, and reports a full disk.

The kernel sends a signal for each thread of a parent that dies. Two SIGTERM in a row would end a run at once, without
saving it, so the kernel is set to send `ORPHANED`, of which the first becomes the one SIGTERM.

A full disk is not the fault of the run that meets it first: it exits with `NO_SPACE`, and the runner ends the sweep.
"""

import os
import runpy
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ORPHANED = signal.SIGUSR1
"""The signal that the kernel sends when the runner dies; before this module handles it, it ends the process."""

NO_SPACE = os.EX_IOERR
"""The exit code of a run that found no space on the disk."""


@contextmanager
def exit_on_full_disk() -> Iterator[None]:
    """Turns every exception that a full disk caused into exit code `NO_SPACE`, since the log may be empty."""
    try:
        yield
    except BaseException as error:
        from core.storage.files import is_disk_full

        if not is_disk_full(error):
            raise
        sys.exit(NO_SPACE)


def _orphaned(signum: int, frame: FrameType | None) -> None:
    """Handles the first `ORPHANED` as SIGTERM, and ignores the others."""
    signal.signal(ORPHANED, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(ORPHANED, _orphaned)
    with exit_on_full_disk():
        runpy.run_module("core.fit", run_name="__main__", alter_sys=True)
