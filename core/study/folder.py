"""A sweep's folder: one runner at a time, and the state of every run on disk at every moment."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from core.contracts.errors import UserError
from core.recipe.resolve import to_dict
from core.study.sweep_file import Sweep, Variant


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        variant: what is run.
        seed: with which seed.
        path: its run folder.
    """

    variant: Variant
    seed: int
    path: Path

    @property
    def name(self) -> str:
        """As people are told of it."""
        return f"{self.variant.name}/seed-{self.seed}"

    @property
    def ranks(self) -> int:
        """Processes that train it together, as its recipe's strategy says."""
        return max(1, int(getattr(self.variant.recipe.strategy.config, "ranks", 1)))

    @property
    def status_file(self) -> Path:
        """Where its state is kept."""
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.path / "log.txt"


@dataclass(frozen=True)
class Status:
    """The state of a run: waiting, running, done or failed.

    Args:
        state: one of these.
        reason: why it failed.
        seconds: how long its process ran, all attempts together.
        process: of the attempt under way.
    """

    state: str
    reason: str | None = None
    seconds: float = 0.0
    process: int | None = None


class SweepFolder:
    """The files of a sweep by name.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def jobs(self, sweep: Sweep) -> list[Job]:
        """Seed by seed, so that an unfinished sweep still compares all variants."""
        runs = self.path / "runs"
        return [Job(v, seed, runs / v.name / f"seed-{seed}") for seed in sweep.schema.seeds for v in sweep.variants]

    def recipe(self, variant: Variant) -> Path:
        """The variant's resolved recipe."""
        return self.path / "recipes" / f"{variant.name}.yaml"

    def open(self, sweep: Sweep, *, resume: bool) -> None:
        """Make the folder, or find the same sweep in it.

        Raises:
            UserError: another sweep is there, or this one without `resume`, or it cannot be written.
        """
        mine, file = describe_file(sweep), self.path / "sweep.yaml"
        if file.exists():
            theirs = _without_paths(self._read(file))
            if theirs != _without_paths(mine):
                raise UserError(f"--out {self.path}: holds another sweep ({_difference(theirs, _without_paths(mine))})")
            if not resume:
                raise UserError(f"--out {self.path}: holds this sweep already; go on with --resume, or name another")
            self._check_recipes(sweep)
            return
        strange = sorted(p.name for p in self.path.iterdir() if p.name != "recipes" and not p.name.startswith("."))
        if strange:
            raise UserError(f"--out {self.path}: holds something that is no sweep ({strange[0]}); name another folder")
        for variant in sweep.variants:
            self.write(self.recipe(variant), yaml.safe_dump(variant.recipe.to_dict(), sort_keys=False, width=120))
        self.write(file, yaml.safe_dump(mine, sort_keys=False, width=120))

    def _check_recipes(self, sweep: Sweep) -> None:
        """Raises `UserError` where a variant's recipe has been changed since its runs were begun."""
        for variant in sweep.variants:
            theirs = self._read(self.recipe(variant))
            mine = yaml.safe_load(yaml.safe_dump(variant.recipe.to_dict()))
            if theirs != mine:
                key = next(key for key in [*mine, *theirs] if mine.get(key) != theirs.get(key))
                raise UserError(
                    f"--out {self.path}: {variant.name}'s recipe has changed since ({key}); name another folder"
                )

    def _read(self, file: Path) -> dict[str, Any]:
        """Raises `UserError` where one of the sweep's own files is lost or damaged."""
        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
            why = cause.strerror if isinstance(cause, OSError) else "it is damaged"
            raise UserError(f"--out {self.path}: {file.relative_to(self.path)} cannot be read: {why}") from cause
        if not isinstance(document, dict):
            raise UserError(f"--out {self.path}: {file.relative_to(self.path)} cannot be read: it is damaged")
        return document

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other runner out; the lock goes with the process, however it ends.

        Raises:
            UserError: another runner is at work here, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except OSError as cause:
            raise UserError(f"--out {self.path}: cannot be written: {cause.strerror}") from cause
        with lock:
            if not _alone(lock):
                lock.seek(0)
                who = lock.read().strip() or "unknown"
                raise UserError(f"--out {self.path}: another runner (process {who}) works in this folder")
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def status(self, job: Job) -> Status:
        """What is known of a run."""
        try:
            return Status(**json.loads(job.status_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Status("waiting")

    def tell(self, job: Job, status: Status) -> None:
        """Write a run's state down."""
        self.write(job.status_file, json.dumps(asdict(status)) + "\n")

    def write_json(self, name: str, document: Any) -> None:
        """A document of the sweep."""
        self.write(self.path / name, json.dumps(document, indent=2, allow_nan=False) + "\n")

    def write(self, file: Path, text: str) -> None:
        """Under a temporary name first, so that a kill leaves a whole file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)


def _alone(lock: IO[str]) -> bool:
    """Take the lock. A report that looks whether it is held holds it for a moment, a runner for as long as it works."""
    for patience in (0.1, 0.2, 0.0):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(patience)
        else:
            return True
    return False


def describe_file(sweep: Sweep) -> dict[str, Any]:
    """What makes a sweep this one: its keys, and which recipe each variant is."""
    keys: dict[str, Any] = to_dict(sweep.schema)
    keys.pop("smoke")
    recipes = {
        variant.name: {"source": variant.source, "overrides": list(variant.overrides)} for variant in sweep.variants
    }
    return {"name": sweep.name, "smoke": sweep.smoke, **keys, "recipes": recipes}


def _without_paths(document: dict[str, Any]) -> dict[str, Any]:
    """The same sweep has other paths in another checkout; what its recipes hold is compared by itself."""
    plain = {key: value for key, value in document.items() if key != "base"}
    for key, path in (("variants", "recipe"), ("recipes", "source")):
        if isinstance(sections := plain.get(key), dict):
            plain[key] = {name: _less(section, path) for name, section in sections.items()}
    return plain


def _less(section: Any, key: str) -> Any:
    return {k: v for k, v in section.items() if k != key} if isinstance(section, dict) else section


def _difference(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    key = next(key for key in [*mine, *theirs] if mine.get(key) != theirs.get(key))
    return f"{key}: {theirs.get(key)} there, {mine.get(key)} here"
