"""The keys of early stopping and of the GPU's statistics; Lightning is imported where a callback is made."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.contracts.component import Environment
from core.contracts.errors import ConfigError
from core.contracts.schema import setting
from core.contracts.training import CallbackFactory

if TYPE_CHECKING:
    from lightning.pytorch import Callback


class EarlyStopping(CallbackFactory):
    """Ends a run when a metric has not improved for several validations."""

    caveat = (
        "early_stopping makes the length of a run depend on its results, so runs that it ends have unequal budgets "
        "and learning rates that did not reach the end of their schedule"
    )
    example = {"name": "early_stopping"}

    @dataclass(kw_only=True)
    class Config:
        """Which metric is watched, and what counts as an improvement."""

        metric: str = setting("val_loss", doc="a metric of the step's row or of the validation")
        patience: int = setting(
            3, doc="validations in a row without an improvement after which the run ends"
        )
        min_delta: float = setting(0.0, doc="an improvement is larger than this")
        mode: Literal["min", "max"] = setting("min", doc="whether smaller or larger is better")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for values that cannot be right, and for runs without validations on the way."""
            if not self.metric.strip():
                raise ConfigError("metric", "must be the name of a metric, such as val_loss")
            if self.patience < 1:
                raise ConfigError("patience", f"is {self.patience}, and must be at least 1")
            if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
                raise ConfigError(
                    "min_delta", f"is {self.min_delta}, and must be a finite number of at least 0"
                )
            validation = getattr(parent, "validation", None)
            if validation is not None and validation.every_steps is None:
                why = "counts validations, and this run has one only after its last step"
                raise ConfigError("patience", f"{why}: set validation.every_steps")

    def make(self, folder: Path) -> "Callback":
        """Makes the callback, which writes no file of its own."""
        from plugins.callbacks.early_stopping import StopWithoutImprovement

        return StopWithoutImprovement(self.config)


class GpuStatistics(CallbackFactory):
    """Logs the memory and the utilisation of the first rank's GPU, as columns `gpu/...` of the log."""

    example = {"name": "gpu_stats"}

    @dataclass(kw_only=True)
    class Config:
        """How often the GPU is asked."""

        every_steps: int = setting(10, doc="steps from one row with these columns to the next")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for steps less than 1."""
            if self.every_steps < 1:
                raise ConfigError("every_steps", f"is {self.every_steps}, and must be at least 1")

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """Returns that there is no GPU; None if there is one."""
        if environment.device == "cuda":
            return None
        return "needs a GPU, and this machine has none that torch can use; remove it from callbacks"

    def make(self, folder: Path) -> "Callback":
        """Makes the callback, which writes no file of its own."""
        from plugins.callbacks.gpu_stats import GpuStatisticsCallback

        return GpuStatisticsCallback(self.config.every_steps)
