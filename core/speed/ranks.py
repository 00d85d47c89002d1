"""The ranks on which collectives are measured: those of torchrun, or processes that are started here and always end."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from core.contracts.errors import RunFailed, UserError
from core.speed.collectives import Collective
from core.speed.measure import measure

PATIENCE = 600.0
"""Seconds within which the processes have to be done."""

LOOPBACK = {"linux": "lo", "darwin": "lo0"}
"""The network interface of this machine to itself."""


def torchrun_world(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of ranks that torchrun has started; None if it has not started this process.

    Raises:
        UserError: its variables are incomplete.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environment.get(name, "").isdecimal():
            raise UserError(
                f"{name} in the environment: must be a whole number, as torchrun sets it"
            )
    return int(environment["WORLD_SIZE"])


def device_of(accelerator: str, ranks: int, local_rank: int) -> torch.device:
    """The device of a rank: a GPU if there is one for each rank of this machine, and the recipe allows it."""
    if accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() >= ranks:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def measure_under_torchrun(
    collectives: Sequence[Collective], accelerator: str
) -> list[dict[str, Any]] | None:
    """The rows, on the first rank of torchrun; None on the others."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    device = device_of(accelerator, local, int(os.environ["LOCAL_RANK"]))
    with _process_group(device, init_method="env://"):
        rows = measure(collectives, device)
        return rows if dist.get_rank() == 0 else None


def measure_here(
    collectives: Sequence[Collective], ranks: int, accelerator: str, seconds: float = 1.0
) -> list[dict[str, Any]]:
    """The rows, measured by processes of this machine, which have ended when this returns or raises.

    Raises:
        RunFailed: a process failed, or they took too long.
    """
    with tempfile.TemporaryDirectory(prefix="moeloom-bench-") as folder:
        plain = [asdict(collective) for collective in collectives]
        started = start_processes(
            _rank,
            (ranks, folder, plain, accelerator, seconds),
            nprocs=ranks,
            join=False,
            daemon=True,
            start_method="spawn",
        )
        deadline = time.monotonic() + PATIENCE
        try:
            while not started.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise RunFailed(f"the {ranks} ranks were not done after {PATIENCE:.0f} s")
        except (ProcessRaisedException, ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            raise RunFailed(f"rank {error.error_index} could not measure: {last}") from error
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    return rows


def _rank(
    rank: int,
    ranks: int,
    folder: str,
    plain: list[dict[str, Any]],
    accelerator: str,
    seconds: float,
) -> None:
    """What each process does; the first one writes the rows."""
    torch.set_num_threads(1)
    device = device_of(accelerator, ranks, rank)
    store = f"file://{folder}/store"
    with _process_group(device, init_method=store, rank=rank, world_size=ranks):
        rows = measure([Collective(**fields) for fields in plain], device, seconds=seconds)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))


@contextmanager
def _process_group(device: torch.device, **options: Any) -> Iterator[None]:
    """A context with a process group: NCCL on GPUs, else gloo, on loopback where the ranks are processes of ours."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
        options["device_id"] = device
    elif sys.platform in LOOPBACK and "rank" in options:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE), **options)
    try:
        yield
    finally:
        dist.destroy_process_group()
