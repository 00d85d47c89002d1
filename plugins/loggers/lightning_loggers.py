"""Lightning's CSV and TensorBoard loggers, made to continue a resumed run instead of starting over."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from core.contracts.training import LoggerFactory
from core.training.metrics_file import METRICS, STEP, check_metrics, read_metrics, write_metrics


class _Writer(ExperimentWriter):
    """Lightning's CSV writer, which here keeps the rows of an earlier part of the run.

    Where the header grows, the file is replaced in one move, so that a kill loses nothing.
    """

    def __init__(self, log_dir: str, resumed_at: int | None) -> None:
        self._resumed_at = resumed_at
        self._has_begun = False
        super().__init__(log_dir=log_dir)

    def _check_log_dir_exists(self) -> None:
        """Does nothing: an earlier part of the run is looked at when the first row comes."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Adds a row; before the first one, drops the rows that an earlier part wrote after its checkpoint."""
        if not self._has_begun:
            self._continue()
            self._has_begun = True
        super().log_metrics(metrics_dict, step)

    def _continue(self) -> None:
        file = Path(self.metrics_file_path)
        if self._resumed_at is None:
            file.unlink(missing_ok=True)  # a run that starts anew makes all rows again
            return
        found = read_metrics(file)
        if found is None:
            return
        kept = [row for row in found.rows if int(row[STEP]) <= self._resumed_at]
        self.metrics_keys = list(found.columns)
        write_metrics(file, self.metrics_keys, kept)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as rows:
            kept = list(csv.DictReader(rows))
        write_metrics(Path(self.metrics_file_path), fieldnames, kept)


class _CSVLogger(CSVLogger):
    """A logger that writes `metrics.csv` straight into the run folder."""

    _experiment: _Writer | None

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)
        self._resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> _Writer:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(self.log_dir, self._resumed_at)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Logs nothing: the run folder holds the whole recipe."""


class _TensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, which keeps events in memory for up to two minutes; `save()` writes them out."""

    def save(self) -> None:
        """Writes everything to disk."""
        super().save()
        self.experiment.flush()


class CSV(LoggerFactory):
    """Logs metrics to `metrics.csv` in the run folder."""

    example = {"name": "csv"}

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def make(self, folder: Path, *, resumed_at: int | None) -> Logger:
        """The logger; rows after step `resumed_at` are dropped."""
        return _CSVLogger(folder, resumed_at)

    def check_resume(self, folder: Path, *, step: int, every: int) -> list[str]:
        """Checks that the rows of the steps before are there; a file that was removed costs a note."""
        return check_metrics(folder / METRICS, step=step, every=every)


class TensorBoard(LoggerFactory):
    """Logs TensorBoard events to the run folder's `tensorboard/`."""

    example = {"name": "tensorboard"}

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def make(self, folder: Path, *, resumed_at: int | None) -> Logger:
        """The logger; events after step `resumed_at` are purged."""
        first = (resumed_at or 0) + 1
        return _TensorBoardLogger(save_dir=folder, name="", version="tensorboard", purge_step=first)
