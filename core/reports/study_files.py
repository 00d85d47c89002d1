"""Reads the folder of a run or of a sweep, as far as it has been written.

A run under way rewrites its files while they are read, so nothing here relies on a file: what cannot be read counts as
absent and is named in the report.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from core.contracts.errors import UserError
from core.reports.tolerant import (
    is_kept,
    known_state,
    left_out_of,
    list_of,
    placed,
    rows_of,
    section,
    seeds_in,
    text_of,
    variant_of,
)
from core.run.divergence import divergence_in
from core.storage.documents import (
    TOO_DEEP,
    DocumentError,
    check_yaml,
    finite_number,
    parse_object,
    read_bytes,
    read_text,
)
from core.storage.files import is_plain_name, leads_out_of
from core.storage.lock import LOCK, is_locked

IDENTITY = (
    "name",
    "title",
    "metric",
    "better",
    "baseline",
    "seeds",
    "command",
    "started",
    "held_equal",
    "not_equal",
    "smallest_difference",
    "search",
    "left_out",
)
"""Keys of `sweep.json`; until it is written, those that the sweep file has too are taken from there."""


@dataclass
class Run:
    """One run and what its folder holds so far.

    Args:
        variant: its variant's name; the folder's for a run on its own.
        seed: None if it was not recorded.
        path: the folder.
        state: waiting, running, interrupted (its runner is gone), done or failed.
        reason: why it failed.
        seconds: how long it took.
        recipe: `recipe.yaml`.
        summary: `summary.json`.
        provenance: `provenance.json`.
        metrics: a pandas frame of `metrics.csv`; None if there is none.
        sample: `sample.txt`, of a run on its own; "" if there is none.
    """

    variant: str
    seed: int | None
    path: Path
    state: str
    reason: str | None = None
    seconds: float | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: Any = None
    sample: str = ""

    def number(self, key: str) -> float | None:
        """The number that the summary has under a key; None if it has no finite one."""
        return finite_number(self.summary.get(key))

    def has(self, column: str) -> bool:
        """Whether a column of `metrics.csv` holds at least one finite number."""
        if self.metrics is None or column not in self.metrics:
            return False
        return bool(self.metrics[column].notna().any())


@dataclass
class Study:
    """What a report is about: a sweep, or one run.

    Args:
        path: the folder.
        name: the name of the sweep, or of the run's folder.
        sweep: `sweep.json`; None for one run.
        results: `results.json`.
        file: the text of `sweep.yaml`, or of `recipe.yaml` for one run.
        runs: variant by variant.
        unread: sentences about files that could not be read.
    """

    path: Path
    name: str
    sweep: dict[str, Any] | None
    results: dict[str, Any]
    file: str
    runs: list[Run]
    unread: list[str]

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in the sweep's order."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    def of(self, variant: str) -> list[Run]:
        """The runs of a variant."""
        return [run for run in self.runs if run.variant == variant]

    def count(self, state: str) -> int:
        """The number of runs in a state."""
        return sum(run.state == state for run in self.runs)

    @property
    def metric(self) -> str:
        """The key of `summary.json` by which the variants are compared."""
        recorded = (self.sweep or {}).get("metric") or self.results.get("metric")
        return str(recorded or "val_bits_per_byte")


def read(path: Path) -> Study:
    """Reads the folder of a run or of a sweep.

    Raises:
        UserError: it holds neither a run nor a sweep.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; name a run folder or a sweep folder")
    if (path / "sweep.json").exists() or (path / "sweep.yaml").exists():
        return _Reader(path).sweep()
    if (path / "recipe.yaml").exists():
        return _Reader(path).single()
    raise UserError(
        f"{path}: neither a run (no recipe.yaml) nor a sweep (no sweep.json) is in this folder"
    )


class _Reader:
    """Reads one folder and collects what could not be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unread: list[str] = []

    def single(self) -> Study:
        """The study of one run."""
        name = self.path.resolve().name
        run = self.run(self.path, name, None)
        run.sample = self.text(self.path / "sample.txt")
        text = self.text(self.path / "recipe.yaml")
        return Study(self.path, name, None, {}, text, [run], self.unread)

    def sweep(self) -> Study:
        """The study of a sweep; until `sweep.json` is written, the sweep file and the folders are read instead."""
        text = self.text(self.path / "sweep.yaml")
        identity = self.mapping(self.path / "sweep.json")
        declared = self.parsed(self.path / "sweep.yaml", text)
        about = {key: declared.get(key) for key in IDENTITY} | identity
        variants = []
        for variant in list_of(identity, "variants"):
            if isinstance(variant, dict) and "name" in variant:
                variants.append(variant_of(variant))
        for key in ("seeds", "held_equal", "not_equal"):
            about[key] = list_of(about, key)
        about["variants"] = variants
        about["left_out"] = left_out_of(about)
        about["smallest_difference"] = text_of(
            section(about, "smallest_difference").get("sentence")
        )
        about["search"] = list_of(section(about, "search"), "sentences")
        names = [str(variant["name"]) for variant in variants]
        if not names:
            recipes = declared.get("recipes")
            names = list(recipes) if isinstance(recipes, dict) else self._folders()
        results = self.mapping(self.path / "results.json")
        results["rows"] = rows_of(results)
        runs = []
        seeds = [seed for seed in list_of(about, "seeds") if type(seed) is int]
        for folder, variant, seed in self._places(names, seeds):
            runs.append(self.run(folder, variant, seed))
        self._mark_interrupted(runs)
        if not runs:
            raise UserError(f"{self.path}: this sweep names no variants and has no runs yet")
        name = str(about.get("name") or self.path.resolve().name)
        return Study(self.path, name, about, results, text, runs, self.unread)

    def _mark_interrupted(self, runs: list[Run]) -> None:
        """Corrects the state of runs that still count as running although their runner is gone."""
        running = [run for run in runs if run.state == "running"]
        if running and not is_locked(self.path / LOCK):
            for run in running:
                run.state = "interrupted"

    def _folders(self) -> list[str]:
        return sorted(folder.name for folder in (self.path / "runs").glob("*") if folder.is_dir())

    def _places(self, names: list[str], seeds: list[int]) -> Iterator[tuple[Path, str, int | None]]:
        """Folder, variant and seed of each run; without seeds those whose folders exist."""
        for name in names:
            if not is_plain_name(name):
                self.unread.append(f"{name!r} cannot be the name of a variant, so it is left out.")
                continue
            folder = self.path / "runs" / name
            for seed in seeds or seeds_in(folder):
                yield folder / f"seed-{seed}", name, seed

    def run(self, folder: Path, variant: str, seed: int | None) -> Run:
        """One run; if it has no `status.json`, its state follows from the files that exist."""
        status = self.mapping(folder / "status.json")
        summary = self.mapping(folder / "summary.json")
        recipe = self.parsed(folder / "recipe.yaml", self.text(folder / "recipe.yaml"))
        if seed is None:
            recorded = recipe.get("seed")
            seed = recorded if type(recorded) is int else None
        diverged = divergence_in(summary)
        if diverged:
            state = "failed"
        elif summary:
            state = "done"
        elif (folder / "recipe.yaml").exists():
            state = "running"
        else:
            state = "waiting"
        return Run(
            variant=variant,
            seed=seed,
            path=folder,
            state=known_state(status.get("state")) or state,
            reason=text_of(status.get("reason")) if status else diverged,
            seconds=finite_number(status.get("seconds"))
            or finite_number(summary.get("wall_seconds")),
            recipe=recipe,
            summary=summary,
            provenance=self.mapping(folder / "provenance.json"),
            metrics=self.metrics(folder / "metrics.csv"),
        )

    def text(self, file: Path) -> str:
        """The text of a file; "" if it is absent or cannot be read."""
        if self._leads_away(file):
            return ""
        try:
            return read_text(file)
        except DocumentError as cause:
            if file.is_symlink() or file.exists():
                self._could_not(file, cause.why)
            return ""

    def mapping(self, file: Path) -> dict[str, Any]:
        """A JSON object; {} where the file is absent or holds something else."""
        text = self.text(file)
        if not text:
            return {}
        try:
            return parse_object(text.encode(), file)
        except DocumentError as cause:
            return self._could_not(file, cause.why)

    def parsed(self, file: Path, text: str) -> dict[str, Any]:
        """The mapping in the text of a YAML file; {} if it is empty or holds something else."""
        if not text:
            return {}
        try:
            check_yaml(text, file)
            document = yaml.safe_load(text)
        except DocumentError as cause:
            return self._could_not(file, f"it {cause.why}")
        except RecursionError:
            return self._could_not(file, f"it {TOO_DEEP}")
        except (yaml.YAMLError, ValueError, TypeError, OverflowError):
            return self._could_not(file, "it is no YAML")
        if isinstance(document, dict):
            return document
        return self._could_not(file, "it is not a mapping")

    def metrics(self, file: Path) -> Any:
        """A frame of the columns that the report reads; None without a line.

        Infinities and cells that are not numbers count as missing.
        """
        import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]

        if not file.is_file() or self._leads_away(file):
            return None
        try:
            # The line after the last break is still being written.
            whole = read_bytes(file).rpartition(b"\n")[0]
            if not whole:
                return None
            frame = pd.read_csv(
                BytesIO(whole), usecols=is_kept, on_bad_lines="skip", quoting=csv.QUOTE_NONE
            )
        except DocumentError as cause:
            self._could_not(file, cause.why)
            return None
        except (OSError, ValueError, TypeError) as cause:  # pandas' own errors are ValueErrors
            self._could_not(file, cause)
            return None
        frame = frame.apply(pd.to_numeric, errors="coerce")
        return placed(frame.replace([math.inf, -math.inf], math.nan))

    def _leads_away(self, file: Path) -> bool:
        """Whether a file is outside of the folder, through a link; that is noted.

        The folder may be somebody else's, and the page would show what is in the file.
        """
        if not leads_out_of(file, self.path):
            return False
        self._could_not(file, "a symbolic link leads out of the folder")
        return True

    def _could_not(self, file: Path, cause: object) -> dict[str, Any]:
        """Notes that a file could not be read, and returns the empty mapping that replaces it."""
        name = file.relative_to(self.path)
        sentence = f"{name} could not be read ({cause}), so the report leaves it out."
        if sentence not in self.unread:
            self.unread.append(sentence)
        return {}
