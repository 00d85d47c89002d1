"""Callbacks of a recipe find every step's values among Lightning's metrics; without one none are handed over."""

from typing import Any

import lightning as L
from lab import Lab


class Reader(L.Callback):
    """Keeps Lightning's metrics after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_a_callback_reads_the_values_of_each_step(lab: Lab) -> None:
    reader = Reader()
    lab.train("budget.steps=3", callbacks=[reader])
    losses = [values["loss/total"] for values in reader.seen]
    assert len(set(losses)) == 3
    assert reader.seen[0].keys() >= {"grad_norm", "lr", "load/max_vio_batch"}


def test_nothing_is_handed_over_without_a_reader(lab: Lab) -> None:
    module = lab.train("budget.steps=2")
    assert "grad_norm" not in module.trainer.callback_metrics
    assert "grad_norm" in module.step_values
