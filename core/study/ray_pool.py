"""The same runs on a Ray cluster. Its nodes must see the sweep's folder under the same path and have moeloom."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any

from core.contracts.errors import UserError
from core.study.folder import Job
from core.study.runner import GRACE, start, threads_begun_with

POLL = 0.2
"""Seconds between two looks at whether a run has ended."""


class RayPool:
    """A task for each run, with the resources that its recipe asks for.

    Args:
        address: of the cluster (`auto`, `ray://host:port`), or `local` for one on this machine.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as cause:
            raise UserError("--ray: Ray is not installed here: pip install 'moeloom[ray]'") from cause
        self.ray: Any = ray
        own = {"include_dashboard": False} if address == "local" else {}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told unless the user says so
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True, **own)
        except Exception as cause:
            why = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise UserError(f"--ray {address}: no cluster answers: {why}") from cause
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray's own ends this process at once, and no run is told
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._tasks: list[Any] = []

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Hand the run to the cluster."""
        cpus, gpus = resources(job)
        remote = self.ray.remote(max_retries=0, num_cpus=cpus, num_gpus=gpus)(_on_a_node)
        task = remote.remote(command, str(job.log), threads_begun_with(job) or max(1, cpus // job.ranks))
        self._tasks.append(task)
        future: Future[tuple[int, float]] = Future()
        Thread(target=self._await, args=(job, task, future), daemon=True).start()
        return future

    def _await(self, job: Job, task: Any, future: "Future[tuple[int, float]]") -> None:
        """A run that the cluster lost is one that failed, and stops no other."""
        began = time.monotonic()
        try:
            future.set_result(self.ray.get(task))
        except Exception as cause:
            with suppress(OSError), job.log.open("a", encoding="utf-8") as log:
                log.write(f"moeloom: Ray: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}\n")
            future.set_result((1, time.monotonic() - began))

    def stop(self) -> None:
        """Cancel what is under way, give it time to save itself, and let the cluster go."""
        for task in self._tasks:
            with suppress(Exception):
                self.ray.cancel(task, force=False)
        if self._tasks:
            with suppress(Exception):
                self.ray.wait(self._tasks, num_returns=len(self._tasks), timeout=GRACE)
        self.ray.shutdown()


def resources(job: Job) -> tuple[int, int]:
    """CPUs and GPUs of a run: what its strategy says, one CPU where it says nothing."""
    on_gpu = getattr(job.variant.recipe.strategy.config, "accelerator", "cpu") in ("gpu", "cuda")
    return job.ranks, job.ranks if on_gpu else 0


def _on_a_node(command: list[str], log: str, threads: int) -> tuple[int, float]:
    """Runs on the node: the same command as on one machine, by the node's own Python."""
    began = time.monotonic()
    with open(log, "ab") as file:
        process = start([sys.executable, *command[1:]], file, threads)
        try:
            while (code := process.poll()) is None:
                time.sleep(POLL)  # Ray cancels between two steps of Python, and never inside a wait for a process
        except BaseException:  # cancelled: it saves itself
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return code, time.monotonic() - began
