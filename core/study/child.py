"""python -m core.study.child ...: `core.fit` that is told once when its runner has died.

The kernel tells of a parent's death for each of the parent's threads; two SIGTERM in a row would end a run at once,
without saving it. So the kernel sends another signal, and the first of those becomes the one SIGTERM.
"""

import os
import runpy
import signal
from types import FrameType

ORPHANED = signal.SIGUSR1
"""What the kernel sends where the runner has died; until this module is at work it ends the process."""


def _orphaned(signum: int, frame: FrameType | None) -> None:
    signal.signal(ORPHANED, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(ORPHANED, _orphaned)
    runpy.run_module("core.fit", run_name="__main__", alter_sys=True)
