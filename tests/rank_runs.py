"""Whole runs on several ranks, as forked processes, and comparisons of their ends."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, last_checkpoint, rows
from observed_run import differences

from core.checkpoints.listing import remove_checkpoint
from core.run.training import fit
from core.testing.forked_ranks import on_ranks
from core.training.run_folder import RunFolder


def fit_on_ranks(
    lab: Lab,
    run: Path,
    *overrides: str,
    resume: bool = False,
    parent: Path | None = None,
    ranks: int = 2,
    before: Callable[[int], None] = lambda rank: None,
) -> list[Any]:
    """Trains a recipe as the tasks of torchrun do, in forked processes.

    Args:
        lab: has the recipe.
        run: the run folder.
        overrides: of the recipe.
        resume: whether the run continues.
        parent: the run that it begins from.
        ranks: how many processes there are.
        before: is called with the rank before the run.

    Returns:
        What `fit` returned on each rank.
    """
    recipe = lab.recipe(*overrides)

    def work(rank: int) -> Any:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
        before(rank)
        folder = RunFolder(run)
        return fit(recipe, folder, resume=resume, parent=parent, say=lambda _: None)

    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(work, Path(folder), world=ranks)


def cut_after(run: Path, step: int, to: Path) -> Path:
    """A copy of a run as if it had been killed after a checkpoint."""
    shutil.copytree(run, to)
    for checkpoint in (to / "checkpoints").glob("*.ckpt"):
        if checkpoint.name != f"step-{step:08d}.ckpt":
            remove_checkpoint(checkpoint)
    (to / "summary.json").unlink()
    return to


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer states and logged values of two runs agree to 1e-9."""
    first, second = last_checkpoint(one), last_checkpoint(other)
    for part in ("state_dict", "optimizer_states"):
        far = [found for found in differences(first[part], second[part]) if found[0] > 1e-9]
        assert not far, far[:3]
    for a, b in zip(rows(one), rows(other), strict=True):
        for name in a.keys() & b.keys() - {"mfu", "tokens_per_second"}:
            if a[name] and b[name]:
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-9, abs=1e-9), name
