"""Reads the folder of a run or of a sweep, whatever of it is there yet.

A run under way rewrites its files while they are read, so nothing here takes a file for granted: what cannot be read
counts as absent, and is told.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from core.contracts.errors import UserError
from core.reports.lock import is_locked

KEPT = ("step", "tokens", "tokens_per_second", "load/max_vio_batch", "skipped_steps")
"""Columns of `metrics.csv` that the report reads; also those of losses and of validation."""

IDENTITY = ("name", "title", "metric", "better", "baseline", "seeds", "command", "started", "held_equal", "not_equal")
"""Keys of `sweep.json`; those of them that the sweep file has too are taken from there until it is written."""


@dataclass
class Run:
    """One run and what its folder holds so far.

    Args:
        variant: its variant's name; the folder's for a run on its own.
        seed: None where nobody recorded it.
        path: the folder.
        state: waiting, running, interrupted (its runner is gone), done or failed.
        reason: why it failed.
        seconds: how long it took.
        recipe: `recipe.yaml`.
        summary: `summary.json`.
        provenance: `provenance.json`.
        metrics: a pandas frame of `metrics.csv`; None where there is none.
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

    def number(self, key: str) -> float | None:
        """A finite number of the summary."""
        return finite(self.summary.get(key))

    def has(self, column: str) -> bool:
        """Whether a column of `metrics.csv` holds at least one finite number."""
        return self.metrics is not None and column in self.metrics and bool(self.metrics[column].notna().any())


@dataclass
class Study:
    """What a report is about: a sweep, or one run.

    Args:
        path: the folder.
        name: of the sweep, or of the run's folder.
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
        """Their names, in the sweep's order."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    def of(self, variant: str) -> list[Run]:
        """A variant's runs."""
        return [run for run in self.runs if run.variant == variant]

    def count(self, state: str) -> int:
        """How many runs are in a state."""
        return sum(run.state == state for run in self.runs)

    @property
    def metric(self) -> str:
        """What the variants are compared by."""
        return str((self.sweep or {}).get("metric") or self.results.get("metric") or "val_bits_per_byte")


def finite(value: Any) -> float | None:
    """A number that is one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def read(path: Path) -> Study:
    """Read a folder.

    Raises:
        UserError: it holds neither a run nor a sweep.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; name a run folder or a sweep folder")
    if (path / "sweep.json").exists() or (path / "sweep.yaml").exists():
        return _Reader(path).sweep()
    if (path / "recipe.yaml").exists():
        return _Reader(path).single()
    raise UserError(f"{path}: neither a run (no recipe.yaml) nor a sweep (no sweep.json) is in this folder")


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.unread: list[str] = []

    def single(self) -> Study:
        name = self.path.resolve().name
        run = self.run(self.path, name, None)
        text = self.text(self.path / "recipe.yaml")
        return Study(self.path, name, None, {}, text, [run], self.unread)

    def sweep(self) -> Study:
        """Where `sweep.json` is not there yet, the sweep file and the folders say what they can."""
        text = self.text(self.path / "sweep.yaml")
        identity = self.mapping(self.path / "sweep.json")
        asked = self.parsed(self.path / "sweep.yaml", text)
        about = {key: asked.get(key) for key in IDENTITY} | identity
        variants = [v for v in identity.get("variants") or [] if isinstance(v, dict) and "name" in v]
        about["variants"] = variants
        names = [str(v["name"]) for v in variants] or list(asked.get("recipes") or self._folders())
        results = self.mapping(self.path / "results.json")
        runs = [self.run(*where) for where in self._places(names, about.get("seeds") or [])]
        if any(run.state == "running" for run in runs) and not is_locked(self.path / ".lock"):
            runs = [replace(run, state="interrupted") if run.state == "running" else run for run in runs]
        if not runs:
            raise UserError(f"{self.path}: this sweep names no variants and has no runs yet")
        name = str(about.get("name") or self.path.resolve().name)
        return Study(self.path, name, about, results, text, runs, self.unread)

    def _folders(self) -> list[str]:
        return sorted(folder.name for folder in (self.path / "runs").glob("*") if folder.is_dir())

    def _places(self, names: list[str], seeds: list[int]) -> Iterator[tuple[Path, str, int | None]]:
        for name in names:
            folder = self.path / "runs" / name
            found = [p.name.removeprefix("seed-") for p in folder.glob("seed-*")] if not seeds else []
            for seed in seeds or sorted(int(s) for s in found if s.isdigit()):
                yield folder / f"seed-{seed}", name, seed

    def run(self, folder: Path, variant: str, seed: int | None) -> Run:
        status = self.mapping(folder / "status.json")
        summary = self.mapping(folder / "summary.json")
        recipe = self.parsed(folder / "recipe.yaml", self.text(folder / "recipe.yaml"))
        begun = (folder / "recipe.yaml").exists()
        state = status.get("state") or ("done" if summary else "running" if begun else "waiting")
        return Run(
            variant=variant,
            seed=seed if seed is not None else recipe.get("seed"),
            path=folder,
            state=str(state),
            reason=status.get("reason"),
            seconds=finite(status.get("seconds")) or finite(summary.get("wall_seconds")),
            recipe=recipe,
            summary=summary,
            provenance=self.mapping(folder / "provenance.json"),
            metrics=self.metrics(folder / "metrics.csv"),
        )

    def text(self, file: Path) -> str:
        try:
            return file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as cause:
            self._could_not(file, cause)
            return ""

    def mapping(self, file: Path) -> dict[str, Any]:
        text = self.text(file)
        try:
            document = json.loads(text) if text else {}
            return document if isinstance(document, dict) else self._could_not(file, "it holds no mapping")
        except ValueError as cause:
            return self._could_not(file, cause)

    def parsed(self, file: Path, text: str) -> dict[str, Any]:
        try:
            document = yaml.safe_load(text) if text else {}
            return document if isinstance(document, dict) else self._could_not(file, "it holds no mapping")
        except yaml.YAMLError:
            return self._could_not(file, "it is no YAML")

    def metrics(self, file: Path) -> Any:
        """The columns that are of use; infinities count as missing, and so do cells that are no numbers."""
        import pandas as pd  # type: ignore[import-not-found, import-untyped, unused-ignore]

        if not file.exists():
            return None
        try:
            whole = file.read_bytes().rpartition(b"\n")[0]  # the line after the last break is still being written
            if not whole:
                return None
            frame = pd.read_csv(BytesIO(whole), usecols=_is_kept, on_bad_lines="skip", quoting=csv.QUOTE_NONE)
        except (OSError, ValueError) as cause:  # pandas' own errors are ValueErrors
            self._could_not(file, cause)
            return None
        frame = frame.apply(pd.to_numeric, errors="coerce")
        return _placed(frame.replace([math.inf, -math.inf], math.nan))

    def _could_not(self, file: Path, cause: object) -> dict[str, Any]:
        self.unread.append(f"{file.relative_to(self.path)} could not be read ({cause}), so the report goes without it.")
        return {}


def _is_kept(column: str) -> bool:
    return column in KEPT or column.startswith(("loss/", "val_", "val/"))


def _placed(frame: Any) -> Any:
    """Give validation rows, which have no tokens of their own, those of the training row before them."""
    for column in ("tokens", "step"):
        if column not in frame:
            frame[column] = math.nan
    rows_of_training = frame["tokens"].notna()
    frame["step"] = frame["step"].where(rows_of_training).ffill() if rows_of_training.any() else frame["step"]
    frame["tokens"] = frame["tokens"].ffill()
    return frame
