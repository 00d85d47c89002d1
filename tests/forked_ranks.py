"""Ranks as forked processes: they start in no time, and a test gets back what each computed."""

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist


def on_ranks(
    work: Callable[[int], Any], folder: Path, *, world: int, backend: str = "gloo"
) -> list[Any]:
    """The results of a function on ranks, each a forked process; the folder must be empty."""
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(work, rank, folder, world, backend))
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    errors = [(folder / f"error-{rank}").read_text() for rank in range(world)]
    assert codes == [0] * world, "\n".join(errors)
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world)]


def _rank(work: Callable[[int], Any], rank: int, folder: Path, world: int, backend: str) -> int:
    (folder / f"error-{rank}").write_text("")
    try:
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
