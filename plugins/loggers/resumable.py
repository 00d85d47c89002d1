"""Lightning's CSV and TensorBoard loggers, made to continue a resumed run instead of starting over."""

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from core.training.metrics_file import STEP, read_metrics, write_metrics


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
        """Records a row; if the earlier part of the run has one with the same columns at this step, it is replaced.

        Before the first row, those that an earlier part wrote after its checkpoint are dropped.
        """
        if not self._has_begun:
            self._continue()
            self._has_begun = True
        if step is not None and self._resumed_at is not None and step <= self._resumed_at:
            self._drop(step, set(metrics_dict))
        super().log_metrics(metrics_dict, step)

    def _continue(self) -> None:
        """Keeps the rows up to the checkpoint; a run that starts anew makes all rows again."""
        file = Path(self.metrics_file_path)
        if self._resumed_at is None:
            file.unlink(missing_ok=True)
            return
        found = read_metrics(file)
        if found is None:
            return
        kept = [row for row in found.rows if int(row[STEP]) <= self._resumed_at]
        self.metrics_keys = list(found.columns)
        write_metrics(file, self.metrics_keys, kept)

    def _drop(self, step: int, columns: set[str]) -> None:
        """Removes the row of a step that holds these columns."""
        file = Path(self.metrics_file_path)
        found = read_metrics(file)
        if found is None:
            return
        kept = []
        for row in found.rows:
            filled = {name for name, value in row.items() if value != ""} - {STEP}
            if int(row[STEP]) != step or filled != columns:
                kept.append(row)
        write_metrics(file, list(self.metrics_keys), kept)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as rows:
            kept = list(csv.DictReader(rows))
        write_metrics(Path(self.metrics_file_path), fieldnames, kept)


class ResumableCSV(CSVLogger):
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


HPARAM_METRICS = ("val_loss", "val_bits_per_byte")
"""The scalars that TensorBoard's tab of hyper-parameters shows beside them."""


class ResumableTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger, which keeps events in memory for up to two minutes; `save()` writes them out."""

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Writes the hyper-parameters, with the names of the scalars that are their results.

        Lightning would also write a value of each metric at step 0, where nothing has been validated.
        """
        from torch.utils.tensorboard.summary import hparams

        values = {}
        for name, value in dict(params).items():
            values[name] = value if isinstance(value, bool | int | float | str) else str(value)
        for summary in hparams(values, dict.fromkeys(HPARAM_METRICS, 0.0)):
            self.experiment._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

    def save(self) -> None:
        """Writes everything to disk."""
        super().save()
        self.experiment.flush()
