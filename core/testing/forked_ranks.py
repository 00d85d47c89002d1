"""Ranks as forked processes: they start in no time, and a test gets back what each computed."""

import faulthandler
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE_SECONDS = 5.0
"""Seconds that the other ranks have to end by themselves once one has failed."""


def on_ranks(
    work: Callable[[int], Any],
    folder: Path,
    *,
    world: int,
    backend: str = "gloo",
    seconds: float = 600.0,
) -> list[Any]:
    """The results of a function on ranks, each a forked process; all of them have ended when it returns.

    Args:
        work: is called with the rank.
        folder: an empty folder.
        world: the number of ranks.
        backend: the backend of their process group.
        seconds: the time after which ranks that still run are ended.
    """
    children: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(work, rank, folder, world, backend))
        children[pid] = rank
    codes = _wait(children, seconds)
    errors = [
        (folder / f"{kind}-{rank}").read_text()
        for kind in ("fatal", "error")
        for rank in range(world)
    ]
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(errors)
    # What is unpickled was written by the children of this process, into a folder of its own.
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world)]


def _wait(children: dict[int, int], seconds: float) -> list[int]:
    """The exit codes of processes by their ranks; they are ended soon after one fails, or when their time is over."""
    codes = [0] * len(children)
    deadline = time.monotonic() + seconds
    running = dict(children)
    while running:
        for pid, rank in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del running[pid]
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return codes


def _rank(work: Callable[[int], Any], rank: int, folder: Path, world: int, backend: str) -> int:
    (folder / f"error-{rank}").write_text("")
    # A rank that the operating system ends says where it was.
    faulthandler.enable((folder / f"fatal-{rank}").open("w"))
    try:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        (folder / f"result-{rank}").write_bytes(pickle.dumps(work(rank)))
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        return 1
    return 0
