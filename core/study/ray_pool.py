"""Runs of a sweep on a Ray cluster. Its nodes must see the sweep's folder under the same path and have moeloom."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from core.contracts.errors import UserError
from core.study.runner import GRACE, start, threads_begun_with
from core.study.sweep_folder import Job

POLL = 0.2
"""Seconds between two checks whether a run has ended."""


class RayPool:
    """A pool that runs each job as a Ray task, with the resources that its recipe asks for.

    Args:
        address: the cluster's (`auto`, `ray://host:port`), or `local` for one on this machine.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as cause:
            how = "pip install 'moeloom[ray]'"
            raise UserError(f"--ray: Ray is not installed here: {how}") from cause
        self.ray: Any = ray
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            options["include_dashboard"] = False
        # Ray sends usage statistics only if the user has asked for it.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, ignore_reinit_error=True, **options)
        except Exception as cause:
            why = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise UserError(f"--ray {address}: no cluster answers: {why}") from cause
        finally:
            # Ray's own handler would end this process at once, before it has stopped its runs.
            signal.signal(signal.SIGTERM, handler)
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._tasks: list[Any] = []

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Submits the run to the cluster."""
        cpus, gpus = resources(job)
        threads = threads_begun_with(job) or max(1, cpus // job.ranks)
        remote = self.ray.remote(max_retries=0, num_cpus=cpus, num_gpus=gpus)(_task())
        task = remote.remote(command, str(job.log), threads)
        self._tasks.append(task)
        future: Future[tuple[int, float]] = Future()
        Thread(target=self._await, args=(job, task, future), daemon=True).start()
        return future

    def _await(self, job: Job, task: Any, future: "Future[tuple[int, float]]") -> None:
        """Waits for a task; one that the cluster lost counts as a failed run, and the other runs go on."""
        began = time.monotonic()
        try:
            future.set_result(self.ray.get(task))
        except Exception as cause:
            why = " ".join(str(cause).split())[:300]
            with suppress(OSError), job.log.open("a", encoding="utf-8") as log:
                log.write(f"moeloom: Ray: {type(cause).__name__}: {why}\n")
            future.set_result((1, time.monotonic() - began))

    def stop(self) -> None:
        """Cancels the runs under way, gives them time to save themselves, and disconnects from the cluster."""
        for task in self._tasks:
            with suppress(Exception):
                self.ray.cancel(task, force=False)
        if self._tasks:
            with suppress(Exception):
                self.ray.wait(self._tasks, num_returns=len(self._tasks), timeout=GRACE)
        self.ray.shutdown()


def resources(job: Job) -> tuple[int, int]:
    """CPUs and GPUs of a run, from its strategy's ranks and accelerator; one CPU if it has neither."""
    accelerator = getattr(job.variant.recipe.strategy.config, "accelerator", "cpu")
    gpus = job.ranks if accelerator in ("gpu", "cuda") else 0
    return job.ranks, gpus


def _task() -> Callable[[list[str], str, int], tuple[int, float]]:
    """Wraps `_on_a_node` in a function that finds our `core` on a worker, and lets the run's process find it.

    Ray puts the driver's current folder first on a worker's search path, where a user's own package
    `core` would hide ours. A nested function is sent as code, so it runs before `core` is imported.
    The run's process inherits the worker's environment, and a worker of a cluster that runs already
    has not inherited the driver's; so PYTHONSAFEPATH, which `moeloom` sets, is sent with the function.
    """
    folder = str(Path(__file__).resolve().parents[2])
    safe_path = os.environ.get("PYTHONSAFEPATH")

    def task(command: list[str], log: str, threads: int) -> tuple[int, float]:
        if safe_path is not None:
            os.environ["PYTHONSAFEPATH"] = safe_path
        sys.path.insert(0, folder)
        from core.study.ray_pool import _on_a_node

        return _on_a_node(command, log, threads)

    return task


def _on_a_node(command: list[str], log: str, threads: int) -> tuple[int, float]:
    """Runs the command on a node by the node's own Python; returns its exit code and its seconds."""
    began = time.monotonic()
    with open(log, "ab") as file:
        process = start([sys.executable, *command[1:]], file, threads)
        try:
            # Ray cancels between two steps of Python, and never inside a wait for a process.
            while (code := process.poll()) is None:
                time.sleep(POLL)
        except BaseException:  # cancelled: the run saves itself
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return code, time.monotonic() - began
