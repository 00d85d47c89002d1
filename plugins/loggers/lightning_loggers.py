"""The loggers' names and keys; Lightning, which takes seconds to import, is imported where a logger is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.contracts.training import LoggerFactory
from core.training.metrics_file import METRICS, check_metrics

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


class CSV(LoggerFactory):
    """Logs metrics to `metrics.csv` in the run folder."""

    example = {"name": "csv"}

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def make(self, folder: Path, *, resumed_at: int | None) -> "Logger":
        """The logger; rows after step `resumed_at` are dropped."""
        from plugins.loggers.resumable import ResumableCSV

        return ResumableCSV(folder, resumed_at)

    def check_resume(self, folder: Path, *, step: int, every: int) -> list[str]:
        """Checks that the rows of the steps before are there; a file that was removed costs a note."""
        return check_metrics(folder / METRICS, step=step, every=every)


class TensorBoard(LoggerFactory):
    """Logs TensorBoard events to the run folder's `tensorboard/`."""

    example = {"name": "tensorboard"}

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def make(self, folder: Path, *, resumed_at: int | None) -> "Logger":
        """The logger; events after step `resumed_at` are purged."""
        from plugins.loggers.resumable import ResumableTensorBoard

        first = (resumed_at or 0) + 1
        return ResumableTensorBoard(
            save_dir=folder, name="", version="tensorboard", purge_step=first
        )
