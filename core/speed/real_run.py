"""The training step of a real run: the one that `core.fit` takes, by Lightning's Trainer, with its metrics and logs."""

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from core.analysis.size import size_of
from core.assemble import make
from core.data.batch import Batch
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan
from core.speed.batches import TokenBatch
from core.speed.our_steps import OurSteps
from core.training.launchers import launch_of
from core.training.module import TrainingModule
from core.training.setup import make_run_callbacks, make_trainer


class _SameWindow(IterableDataset[list[Batch]]):
    """The same window for every step."""

    def __init__(self, window: list[Batch], steps: int) -> None:
        self.window = window
        self.steps = steps

    def __iter__(self) -> Iterator[list[Batch]]:
        for _ in range(self.steps):
            yield self.window


class _Alternating(L.Callback):
    """Takes a step of the bare loop after each step of the run, and times both."""

    def __init__(self, bare: OurSteps) -> None:
        self.bare = bare
        self.run_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._began: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        """Ends the time of the run's step; the bare step that follows is in the time of neither."""
        now = time.perf_counter()
        if self._began is not None:  # the first step has no beginning, and warms up
            self.run_seconds.append(now - self._began)
        self.bare.run()
        after = time.perf_counter()
        if self._began is not None:
            self.bare_seconds.append(after - now)
        self._began = after


def run_against_steps(
    recipe: Recipe, batches: list[TokenBatch], bare: OurSteps, steps: int
) -> dict[str, Any]:
    """The steps of a real run beside those of the bare loop, one after the other with the same model.

    Beyond the bare step a run's updates the balancers, logs losses, loads and norms, and passes Lightning's loop. It
    saves no checkpoint here.

    Args:
        recipe: what is trained; without checkpoints.
        batches: the window of every step.
        bare: the steps that are compared with; the run trains their model too, with an optimizer of its own.
        steps: how many steps of each are timed.

    Returns:
        The median time of a run's step, and of the bare one over it.
    """
    plan = TrainingPlan(
        sequences=recipe.batch.sequences,
        length=recipe.data.sequence_length,
        micro_batches=len(batches),
        steps=steps + 1,
    )
    module = TrainingModule(
        bare.model,
        plan=plan,
        optimizer=make(recipe.optimizer),
        strategy=bare.strategy,
        flops_per_token=size_of(bare.model).flops_per_token,
        gradient_clip=recipe.gradient_clip,
    )
    window = [_as_batch(batch) for batch in batches]
    loader = DataLoader(_SameWindow(window, plan.steps), batch_size=None)
    turns = _Alternating(bare)
    with tempfile.TemporaryDirectory(prefix="moeloom-bench-") as folder, _silent():
        own = make_run_callbacks(recipe, Path(folder), peak_flops=1.0)
        trainer = make_trainer(
            recipe,
            Path(folder),
            steps=plan.steps,
            loggers=[],
            callbacks=[own.throughput, own.loads, turns],
            stop=own.stop,
            strategy=bare.strategy.trainer_arguments(),
            launch=launch_of(recipe.strategy),
        )
        trainer.fit(module, train_dataloaders=loader)
    pairs = zip(turns.bare_seconds, turns.run_seconds, strict=True)
    return {
        "seconds": median(turns.run_seconds),
        "ratio_to_bare_step": median(alone / run for alone, run in pairs),
        "steps": len(turns.run_seconds),
    }


def _as_batch(batch: TokenBatch) -> Batch:
    """A micro-batch as the data module gives it: every token is valid, and one document is read."""
    tokens_BL = batch.tokens_BL
    documents_BM = tokens_BL.new_zeros(len(tokens_BL), tokens_BL.shape[1] + 1)
    return Batch(tokens_BL, batch.targets_BL, tokens_BL >= 0, documents_BM)


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps Lightning from telling how it was set up."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
