"""A sweep's folder: it admits one runner at a time, and always holds the current state of every run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from core.contracts.errors import UserError
from core.recipe import trust
from core.recipe.key_paths import to_dict
from core.storage.documents import DocumentError, finite_number, read_object, read_yaml
from core.storage.files import write_text
from core.storage.lock import locked_folder
from core.study.sweep_file import Sweep, Variant


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        variant: what is run.
        seed: the run's seed.
        path: the run's folder.
    """

    variant: Variant
    seed: int
    path: Path

    @property
    def name(self) -> str:
        """The name in messages: `VARIANT/seed-N`, of a search `search/VARIANT/seed-N`."""
        stage = "search/" if self.variant.candidate_of else ""
        return f"{stage}{self.variant.name}/seed-{self.seed}"

    @property
    def ranks(self) -> int:
        """The number of processes that train it together, as its recipe's strategy says."""
        strategy = self.variant.recipe.strategy
        ranks: int = strategy.component.ranks_of(strategy.config)
        return max(1, ranks)

    @property
    def status_file(self) -> Path:
        """The file of its state."""
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        """The file of its output."""
        return self.path / "log.txt"


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Args:
        state: "waiting", "running", "done" or "failed".
        reason: why it failed.
        seconds: how long its process ran, all attempts together.
        process: the process id of the attempt under way.
    """

    state: str
    reason: str | None = None
    seconds: float = 0.0
    process: int | None = None

    def is_valid(self) -> bool:
        """Whether every value is of its kind; a damaged file may hold any."""
        return (
            self.state in ("waiting", "running", "done", "failed")
            and isinstance(self.reason, str | None)
            and finite_number(self.seconds) is not None
            and (self.process is None or (type(self.process) is int and self.process > 0))
        )


class SweepFolder:
    """The files of a sweep by name.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def jobs(self, sweep: Sweep) -> list[Job]:
        """The runs of a sweep, seed by seed, so that an unfinished sweep still compares all variants."""
        jobs = []
        for seed in sweep.schema.seeds:
            for variant in sweep.variants:
                path = self.path / "runs" / variant.name / f"seed-{seed}"
                jobs.append(Job(variant, seed, path))
        return jobs

    def search_jobs(self, sweep: Sweep) -> list[Job]:
        """The runs of a sweep's search, seed by seed; none without a search."""
        jobs = []
        for seed in sweep.schema.search.seeds:
            for candidate in sweep.candidates:
                path = self.path / "search" / candidate.name / f"seed-{seed}"
                jobs.append(Job(candidate, seed, path))
        return jobs

    def recipe(self, variant: Variant) -> Path:
        """The file of a variant's resolved recipe; those of a search have a folder of their own."""
        recipes = self.path / "recipes"
        if variant.candidate_of:
            recipes = recipes / "search"
        return recipes / f"{variant.name}.yaml"

    def open(self, sweep: Sweep, *, resume: bool) -> None:
        """Writes the sweep's files into an empty folder, or checks that the folder holds the same sweep.

        Args:
            sweep: the sweep to be run here.
            resume: whether the folder may hold the sweep already.

        Raises:
            UserError: the folder holds another sweep, or this one without `resume`, or other files.
        """
        file = self.path / "sweep.yaml"
        if file.exists():
            self._check_same(sweep, file)
            if not resume:
                raise UserError(
                    f"--out {self.path}: holds this sweep already; go on with --resume, or name another"
                )
            self._check_recipes(sweep.candidates or sweep.variants)
            return
        self._check_empty()
        self._write_recipes(sweep.candidates or sweep.variants)
        self._write_yaml(file, describe_file(sweep))

    def add_chosen(self, variants: list[Variant]) -> None:
        """Writes the recipes that a search has chosen, or checks that the folder holds the same ones.

        Raises:
            UserError: it holds others.
        """
        known = [variant for variant in variants if self.recipe(variant).exists()]
        self._check_recipes(known)
        self._write_recipes([variant for variant in variants if variant not in known])

    def _write_recipes(self, variants: list[Variant]) -> None:
        """Writes the resolved recipes of some variants."""
        for variant in variants:
            self._write_yaml(self.recipe(variant), variant.recipe.to_dict())

    def _check_same(self, sweep: Sweep, file: Path) -> None:
        """Raises `UserError` if the folder holds another sweep."""
        theirs = _without_paths(self._read(file))
        mine = _without_paths(describe_file(sweep))
        if theirs != mine:
            key = _first_difference(theirs, mine)
            difference = f"{key}: {theirs.get(key)} there, {mine.get(key)} here"
            raise UserError(f"--out {self.path}: holds another sweep ({difference})")

    def _check_recipes(self, variants: list[Variant]) -> None:
        """Raises `UserError` if a variant's recipe has been changed since its runs were begun."""
        for variant in variants:
            theirs = self._read(self.recipe(variant))
            mine = yaml.safe_load(yaml.safe_dump(variant.recipe.to_dict()))
            if theirs != mine:
                key = _first_difference(theirs, mine)
                change = f"{variant.name}'s recipe has changed since ({key})"
                raise UserError(f"--out {self.path}: {change}; name another folder")

    def _check_empty(self) -> None:
        """Raises `UserError` if the folder holds more than hidden files and recipes."""
        for file in sorted(self.path.iterdir()):
            if file.name != "recipes" and not file.name.startswith("."):
                raise UserError(
                    f"--out {self.path}: is not a sweep's folder: it holds {file.name}; name another"
                )

    def _write_yaml(self, file: Path, document: dict[str, Any]) -> None:
        self.write(file, yaml.safe_dump(document, sort_keys=False, width=120))
        trust.record(file)

    def _read(self, file: Path) -> dict[str, Any]:
        """Reads one of the sweep's own files; raises `UserError` if it is lost or damaged."""
        where = f"--out {self.path}: {file.relative_to(self.path)}"
        try:
            document = yaml.safe_load(read_yaml(file))
        except DocumentError as cause:
            raise UserError(f"{where}: {cause.why}") from cause
        except (yaml.YAMLError, RecursionError, ValueError) as cause:
            raise UserError(f"{where}: is damaged") from cause
        if not isinstance(document, dict):
            raise UserError(f"{where}: is damaged")
        return document

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock, which the kernel releases when the process ends, however it ends.

        Raises:
            UserError: another runner holds the lock, or the folder cannot be made.
        """
        with locked_folder(self.path, "runner"):
            yield

    def status(self, job: Job) -> Status:
        """The state of a run as its file has it; "waiting" if there is none."""
        try:
            status = Status(**read_object(job.status_file))
        except (DocumentError, TypeError):
            return Status("waiting")
        return status if status.is_valid() else Status("waiting")

    def write_status(self, job: Job, status: Status) -> None:
        """Writes the state of a run."""
        self.write(job.status_file, json.dumps(asdict(status)) + "\n")

    def write_json(self, name: str, document: Any) -> None:
        """Writes a JSON document of the sweep."""
        self.write(self.path / name, json.dumps(document, indent=2, allow_nan=False) + "\n")

    def write(self, file: Path, text: str) -> None:
        """Writes a file under a temporary name first, so that a kill leaves a whole file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def describe_file(sweep: Sweep) -> dict[str, Any]:
    """The identity of a sweep, as in its `sweep.yaml`: its keys, and the recipe of each variant."""
    keys: dict[str, Any] = to_dict(sweep.schema)
    keys.pop("smoke")
    keys.pop("expected_sd")  # it changes no run
    for key in ("skip", "skip_refused"):  # as in folders that an earlier version began
        if not keys[key]:
            keys.pop(key)
    if not sweep.candidates:
        keys.pop("search")
        for section in keys["variants"].values():
            section.pop("search")
    recipes = {}
    for variant in sweep.variants:
        recipes[variant.name] = {"source": variant.source, "overrides": list(variant.overrides)}
    return {"name": sweep.name, "smoke": sweep.smoke, **keys, "recipes": recipes}


def _without_paths(document: dict[str, Any]) -> dict[str, Any]:
    """A sweep's identity without its paths, which another checkout changes; recipes are compared by their contents."""
    plain: dict[str, Any] = _without(document, "base")
    for key, path in (("variants", "recipe"), ("recipes", "source")):
        if isinstance(sections := plain.get(key), dict):
            plain[key] = {name: _without(section, path) for name, section in sections.items()}
    return plain


def _without(section: Any, key: str) -> Any:
    """A copy of a section without a key; a damaged file may have another value in its place, which is returned."""
    if isinstance(section, dict):
        return {k: v for k, v in section.items() if k != key}
    return section


def _first_difference(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """The first key whose values differ."""
    return next(key for key in [*mine, *theirs] if mine.get(key) != theirs.get(key))
