"""Early stopping, after the validations of a run."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from core.contracts.errors import UserError, nearest


class StopWithoutImprovement(L.Callback):
    """Ends the run after some validations in a row that did not improve a metric.

    Lightning's EarlyStopping forgets after a resume that it had ended the run, and reads only the metrics that have
    passed through Lightning; so this is a class of its own. A metric that is not finite is no improvement.

    Attributes:
        end_reason: why the run ended; None while it goes on.
    """

    def __init__(self, config: Any) -> None:
        self.metric = config.metric
        self.patience = config.patience
        self.min_delta = config.min_delta
        self.sign = 1.0 if config.mode == "min" else -1.0
        self.best: float | None = None
        self.waited = 0
        self.end_reason: str | None = None

    @property
    def state_key(self) -> str:
        """The name of the state in checkpoints; two of these callbacks may watch two metrics."""
        return f"early_stopping {self.metric}"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends at once a resumed run that had ended before its summary was written."""
        if self.end_reason is not None:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the metric; the decision is the same on all ranks."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        value = self._value(pl_module)
        stops = self._is_over(value)
        if not trainer.strategy.reduce_boolean_decision(stops, all=False):
            return
        best = "never finite" if self.best is None else f"{self.best:.6g}"
        self.end_reason = (
            f"early_stopping: {self.metric} = {value:.6g} was the last of {self.waited} validations in a row that did "
            f"not improve its best value, {best}, by more than {self.min_delta:g}"
        )
        trainer.should_stop = True

    def _value(self, module: Any) -> float:
        """The metric in the step's row or in the validation just done.

        Raises:
            UserError: neither has it.
        """
        known = {**module.step_values, **module.validated}
        if self.metric not in known:
            raise UserError(
                f"callbacks: early_stopping.metric = {self.metric!r} is not logged by this run; "
                f"{nearest(self.metric, sorted(known))}"
            )
        return float(known[self.metric])

    def _is_over(self, value: float) -> bool:
        """Counts the validation; returns whether patience is at its end."""
        improved = math.isfinite(value) and (
            self.best is None or self.sign * (self.best - value) > self.min_delta
        )
        if improved:
            self.best = value
            self.waited = 0
        else:
            self.waited += 1
        return bool(self.waited >= self.patience)

    def state_dict(self) -> dict[str, Any]:
        """The best value, the validations since, and why the run ended."""
        return {"best": self.best, "waited": self.waited, "end_reason": self.end_reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from the state of a checkpoint."""
        self.best = state_dict["best"]
        self.waited = int(state_dict["waited"])
        self.end_reason = state_dict["end_reason"]
