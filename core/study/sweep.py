"""Runs a sweep from its file to its results: validate, match, run, compare."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.analysis.budget import plan_of
from core.command import command_line
from core.contracts.errors import UserError
from core.recipe.key_paths import to_dict
from core.run.data import text_data
from core.storage.documents import DocumentError, read_object
from core.storage.files import is_disk_full
from core.study.matching import Matched, match
from core.study.pace import Pace
from core.study.ray_pool import RayPool
from core.study.results import (
    HELD_OUT,
    NOTHING_HELD_OUT,
    sweep_document,
    sweep_results,
    value_of,
)
from core.study.runner import LocalPool, Pool, run_jobs
from core.study.sweep_file import Sweep
from core.study.sweep_folder import Job, Status, SweepFolder

ProgressCallback = Callable[[Job | None, Status | None, int, int, float | None], None]
"""A callback that reports a run, its status, the number of ended runs and of all, and seconds left (`run_sweep`)."""


def run_sweep(
    sweep: Sweep,
    path: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    resume: bool = False,
    command: str = "",
    progress: ProgressCallback = lambda *_: None,
) -> dict[str, Any]:
    """Runs what is not done yet, and returns the document `results.json`.

    Args:
        sweep: validated.
        path: the sweep's folder.
        workers: runs at a time on this machine.
        ray: a Ray cluster's address; None: the runs are processes on this machine.
        resume: go on with what is in the folder.
        command: the command line that began the sweep, kept in `sweep.json`.
        progress: called at the beginning (None, None, done, all, None) and after each run (run, its status, done, all,
            seconds left).

    Raises:
        UserError: variants cannot be compared, the folder holds something else, or the disk is full.
    """
    matched = match(sweep)
    folder = SweepFolder(path.resolve())
    try:
        with folder.locked():
            folder.open(sweep, resume=resume)
            began = _beginning(folder, command or command_line())
            folder.write_json("sweep.json", sweep_document(sweep, matched, **began))
            jobs = folder.jobs(sweep)
            left = [job for job in jobs if not _is_done(job, folder, sweep.schema.metric)]
            progress(None, None, len(jobs) - len(left), len(jobs), None)
            if left:
                if ray is None:
                    _prepare(sweep)
                _work_on(left, _pool(folder, workers, ray), sweep, folder, matched, progress)
            found = sweep_results(sweep, folder, matched)
            folder.write_json("results.json", found)
            return found
    except OSError as error:
        if is_disk_full(error):
            how = "free some space and go on with --resume"
            raise UserError(f"{path}: no space is left on the disk; {how}") from error
        raise


def _is_done(job: Job, folder: SweepFolder, metric: str) -> bool:
    """Whether a run is done and its result can be read; where that is lost, the run writes it again."""
    return folder.status(job).state == "done" and value_of(job, metric) is not None


def _work_on(
    left: list[Job],
    pool: Pool,
    sweep: Sweep,
    folder: SweepFolder,
    matched: Matched,
    progress: ProgressCallback,
) -> None:
    """Works on every run that is left; after each, writes the results so far and reports the time that is left."""
    pace = Pace({job.name: _flops(matched.documents[job.variant.name]) for job in left}, pool.slots)
    jobs = len(folder.jobs(sweep))
    ended = jobs - len(left)

    def before(job: Job) -> None:
        pace.begin(job.name, fresh=not (job.path / "recipe.yaml").exists())

    def after(job: Job, status: Status) -> None:
        nonlocal ended
        ended += 1
        pace.end(job.name, whole=status.state == "done")
        folder.write_json("results.json", sweep_results(sweep, folder, matched))
        progress(job, status, ended, jobs, pace.left())

    metric = sweep.schema.metric
    run_jobs(left, folder, pool, metric, trust=sweep.trust, began=before, ended=after)


def _prepare(sweep: Sweep) -> None:
    """Prepares the data of every run in the cache, before several runs would prepare it at once.

    Raises:
        UserError: the data are invalid, or the metric is measured on validation text and there is none.
    """
    metric = sweep.schema.metric
    prepared: list[Any] = []
    for variant in sweep.variants:
        source = variant.recipe.data
        key = to_dict(source)
        if key in prepared:
            continue
        prepared.append(key)
        data = text_data(variant.recipe, plan_of(variant.recipe))
        data.prepare()
        if metric in HELD_OUT and not data.validation_bytes:
            why = f"{variant.name} cannot have it: {NOTHING_HELD_OUT}"
            raise UserError(f"sweep {sweep.name}: metric = {metric!r}: {why}")


def _flops(document: dict[str, Any]) -> float:
    """The training FLOPs of a whole run: FLOPs per token x tokens, both from its description."""
    return float(document["flops_per_token"]) * float(document["tokens"])


def _beginning(folder: SweepFolder, command: str) -> dict[str, str]:
    """The time and the command that first began the sweep, which a resumption keeps."""
    try:
        before = read_object(folder.path / "sweep.json")
        return {key: str(before[key]) for key in ("command", "started")}
    except (DocumentError, KeyError):
        return {"command": command, "started": datetime.now(UTC).isoformat(timespec="seconds")}


def _pool(folder: SweepFolder, workers: int, ray: str | None) -> Pool:
    """A Ray cluster if an address is given, else processes on this machine."""
    if ray is not None:
        return RayPool(ray)

    def started(job: Job, process: int) -> None:
        before = folder.status(job)
        folder.write_status(job, Status("running", None, before.seconds, process))

    return LocalPool(workers, started)
