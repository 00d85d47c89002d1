"""python -m core.study.child ...: `core.fit` that is told once of its runner's death, and tells of a full disk.

The kernel tells of a parent's death for each of the parent's threads; two SIGTERM in a row would end a run at once,
without saving it. So the kernel sends another signal, and the first of those becomes the one SIGTERM.

A full disk is no fault of the run that meets it first: it leaves with an exit code of its own, and the sweep ends.
"""

import os
import runpy
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ORPHANED = signal.SIGUSR1
"""What the kernel sends where the runner has died; until this module is at work it ends the process."""

NO_SPACE = os.EX_IOERR
"""How a run is left that found no space on the disk."""


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Whatever leaves because no space was left, leaves with `NO_SPACE`: even where its log took no word of it."""
    try:
        yield
    except BaseException as leaving:
        from core.training.checkpoints import is_disk_full

        if not is_disk_full(leaving):
            raise
        sys.exit(NO_SPACE)


def _orphaned(signum: int, frame: FrameType | None) -> None:
    signal.signal(ORPHANED, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(ORPHANED, _orphaned)
    with full_disk_told():
        runpy.run_module("core.fit", run_name="__main__", alter_sys=True)
