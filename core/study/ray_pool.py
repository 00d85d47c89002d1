"""The same runs on a Ray cluster. Its nodes must see the sweep's folder under the same path and have moeloom."""

import os
import subprocess
import time
from concurrent.futures import Future
from threading import Thread
from typing import Any

from core.contracts.errors import UserError
from core.study.folder import Job


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
        try:
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        except Exception as cause:
            raise UserError(f"--ray {address}: no cluster answers: {str(cause).splitlines()[0]}") from cause
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._tasks: list[Any] = []

    def submit(self, job: Job, command: list[str]) -> "Future[tuple[int, float]]":
        """Hand the run to the cluster."""
        cpus, gpus = resources(job)
        remote = self.ray.remote(max_retries=0, num_cpus=cpus, num_gpus=gpus)(_on_a_node)
        task = remote.remote(command, str(job.log), cpus)
        self._tasks.append(task)
        future: Future[tuple[int, float]] = Future()
        Thread(target=self._await, args=(task, future), daemon=True).start()
        return future

    def _await(self, task: Any, future: "Future[tuple[int, float]]") -> None:
        try:
            future.set_result(self.ray.get(task))
        except Exception as cause:
            future.set_exception(cause)

    def stop(self) -> None:
        """Cancel what is under way and let the cluster go."""
        for task in self._tasks:
            self.ray.cancel(task, force=False)
        self.ray.shutdown()


def resources(job: Job) -> tuple[int, int]:
    """CPUs and GPUs of a run: what its strategy says, one CPU where it says nothing."""
    config = job.variant.recipe.strategy.config
    ranks = int(getattr(config, "ranks", 1))
    on_gpu = getattr(config, "accelerator", "cpu") in ("gpu", "cuda")
    return max(1, ranks), ranks if on_gpu else 0


def _on_a_node(command: list[str], log: str, threads: int) -> tuple[int, float]:
    """Runs on the node: the same command as on one machine."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "ab") as file:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)
    return done.returncode, time.monotonic() - began
