"""Runs a sweep from its file to its results: validate, match, run, compare."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from core.study.csv_tables import write_tables
from core.study.gpus import gpu_slots
from core.study.matching import Matched, match
from core.study.pace import Pace
from core.study.ray_pool import RayPool
from core.study.results import (
    NOTHING_HELD_OUT,
    is_held_out,
    runs_per_gpu,
    sweep_document,
    sweep_results,
    value_of,
)
from core.study.runner import LocalPool, Pool, run_jobs
from core.study.search import FILE, METRIC, chosen_variants, recorded_search, search_results
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
    per_gpu: int | None = None,
    resume: bool = False,
    command: str = "",
    progress: ProgressCallback = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs what is not done yet, and returns the document `results.json`.

    Args:
        sweep: validated.
        path: the sweep's folder.
        workers: runs at a time on this machine.
        ray: a Ray cluster's address; None: the runs are processes on this machine.
        per_gpu: runs that share each GPU of this machine; then `workers` has no effect. None: runs share the cores.
        resume: go on with what is in the folder.
        command: the command line that began the sweep, kept in `sweep.json`.
        progress: called at the beginning (None, None, done, all, None) and after each run (run, its status, done, all,
            seconds left).
        say: called before the first run with what the sweep could show, and with the budgets of a search.

    Raises:
        UserError: variants cannot be compared, the folder holds something else, or the disk is full.
    """
    gpus = gpu_slots(sweep, per_gpu) if per_gpu else []
    matched = match(sweep)
    folder = SweepFolder(path.resolve())
    try:
        with folder.locked():
            folder.open(sweep, resume=resume)
            began = _beginning(folder, command or command_line(), per_gpu)
            document = sweep_document(sweep, matched, **began)
            folder.write_json("sweep.json", document)
            for line in beforehand(document):
                say(line)
            stage = Stage(
                sweep, folder, matched, progress, lambda: _pool(folder, workers, ray, gpus)
            )
            if ray is None:
                stage.prepare = lambda: _prepare(sweep)
            search = None
            if sweep.candidates:
                search = stage.search()
                sweep = replace(sweep, variants=chosen_variants(sweep, search))
                folder.add_chosen(sweep.variants)
                matched = match(sweep)
                folder.write_json("sweep.json", sweep_document(sweep, matched, **began))
                stage = replace(stage, sweep=sweep, matched=matched)
            stage.compare(search)
            return write_results_of(sweep, folder, matched, search)
    except OSError as error:
        if is_disk_full(error):
            how = "free some space and go on with --resume"
            raise UserError(f"{path}: no space is left on the disk; {how}") from error
        raise


def write_results_of(
    sweep: Sweep, folder: SweepFolder, matched: Matched, search: dict[str, Any] | None
) -> dict[str, Any]:
    """Writes `results.json`, which it returns, and the tables `runs.csv` and `variants.csv`."""
    found = sweep_results(sweep, folder, matched, search)
    folder.write_json("results.json", found)
    write_tables(sweep, folder, matched, found)
    return found


def beforehand(document: dict[str, Any]) -> list[str]:
    """What is known of a sweep before its first run: the smallest difference it could show, the budgets of a search.

    Args:
        document: `sweep.json`.
    """
    lines = [f"could show: {document['smallest_difference']['sentence']}"]
    for sentence in (document["search"] or {}).get("sentences", []):
        lines.append(f"budget of the search: {sentence}")
    return lines


def _is_done(job: Job, folder: SweepFolder, metric: str) -> bool:
    """Whether a run is done and its result can be read; where that is lost, the run writes it again."""
    return folder.status(job).state == "done" and value_of(job, metric) is not None


@dataclass
class Stage:
    """The runs of a sweep's search, or of its comparison.

    Args:
        sweep: its variants, with chosen values once there are any.
        folder: the sweep's.
        matched: the variants' descriptions.
        progress: that of `run_sweep`; a search's runs are counted together with those of the comparison.
        make_pool: returns a place that works on runs.
        prepare: called before the first run.
    """

    sweep: Sweep
    folder: SweepFolder
    matched: Matched
    progress: ProgressCallback
    make_pool: Callable[[], Pool]
    prepare: Callable[[], None] = lambda: None

    def search(self) -> dict[str, Any]:
        """Runs what is left of the search and returns its document; one that has chosen is not run again."""
        sweep = self.sweep
        folder = self.folder
        recorded = recorded_search(sweep, folder)
        if recorded is not None:
            return recorded

        def write_results() -> None:
            so_far = search_results(sweep, folder)
            write_results_of(sweep, folder, self.matched, so_far)

        jobs = folder.search_jobs(sweep)
        later = len(folder.jobs(sweep))
        self._work_on(jobs, METRIC, write_results, before=0, after=later)
        found = search_results(sweep, folder)
        chosen_variants(sweep, found)
        folder.write_json(FILE, found)
        return found

    def compare(self, search: dict[str, Any] | None) -> None:
        """Runs what is left of the comparison; after each run the results so far are written.

        Args:
            search: the document of the search that came before; None: there was none.
        """
        sweep = self.sweep
        folder = self.folder

        def write_results() -> None:
            write_results_of(sweep, folder, self.matched, search)

        before = len(folder.search_jobs(sweep))
        self._work_on(
            folder.jobs(sweep), sweep.schema.metric, write_results, before=before, after=0
        )

    def _work_on(
        self,
        jobs: list[Job],
        metric: str,
        write_results: Callable[[], None],
        *,
        before: int,
        after: int,
    ) -> None:
        """Works on every run that is not done; after each, reports the time that this stage still takes.

        Args:
            jobs: the stage's runs.
            metric: a finished run must have it.
            write_results: called after each run.
            before, after: runs of other stages, for the count of all.
        """
        left = [job for job in jobs if not _is_done(job, self.folder, metric)]
        ended = before + len(jobs) - len(left)
        total = before + len(jobs) + after
        self.progress(None, None, ended, total, None)
        if not left:
            return
        self.prepare()
        pool = self.make_pool()
        pace = Pace({job.name: self._flops(job) for job in left}, pool.slots)

        def began(job: Job) -> None:
            pace.begin(job.name, fresh=not (job.path / "recipe.yaml").exists())

        def done(job: Job, status: Status) -> None:
            nonlocal ended
            ended += 1
            pace.end(job.name, whole=status.state == "done")
            write_results()
            self.progress(job, status, ended, total, pace.left())

        run_jobs(left, self.folder, pool, metric, trust=self.sweep.trust, began=began, ended=done)

    def _flops(self, job: Job) -> float:
        """The training FLOPs of a whole run: FLOPs per token x tokens, both from its variant's description."""
        document = self.matched.documents[job.variant.candidate_of or job.variant.name]
        return float(document["flops_per_token"]) * float(document["tokens"])


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
        if (is_held_out(metric) or sweep.candidates) and not data.validation_bytes:
            if not is_held_out(metric):
                metric = METRIC
            why = f"{variant.name} cannot have it: {NOTHING_HELD_OUT}"
            raise UserError(f"sweep {sweep.name}: metric = {metric!r}: {why}")


def _beginning(folder: SweepFolder, command: str, per_gpu: int | None) -> dict[str, Any]:
    """The time and the command that first began the sweep, which a resumption keeps, and the most runs of a GPU."""
    most = max(per_gpu or 0, runs_per_gpu(folder)) or None
    try:
        before = read_object(folder.path / "sweep.json")
        began = {key: str(before[key]) for key in ("command", "started")}
    except (DocumentError, KeyError):
        began = {"command": command, "started": datetime.now(UTC).isoformat(timespec="seconds")}
    return {**began, "per_gpu": most}


def _pool(folder: SweepFolder, workers: int, ray: str | None, gpus: list[str]) -> Pool:
    """A Ray cluster if an address is given, else processes on this machine, one for each entry of `gpus` if any."""
    if ray is not None:
        return RayPool(ray)

    def started(job: Job, process: int) -> None:
        before = folder.status(job)
        folder.write_status(job, Status("running", None, before.seconds, process))

    return LocalPool(len(gpus) or workers, started, gpus)
