"""The run that another one continues in a new folder (`--from`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.analysis.budget import plan_of
from core.checkpoints.index import INDEX
from core.checkpoints.listing import is_checkpoint
from core.contracts.errors import UserError
from core.recipe.compose import Recipe, compose_run
from core.run.loading import run_of
from core.storage.digests import digest_of
from core.training.early_checks import check_trained
from core.training.resume import (
    Resume,
    check_tokenizer_unchanged,
    first_difference,
    newest_checkpoint,
    read_start,
)
from core.training.run_folder import RunFolder

RULE = (
    "a run with --from may change budget, gradient_clip, the optimizer's settings but not its name, and what a resumed "
    "run may change; initial_weights takes weights into another model"
)
"""What may change, as the end of an error message."""

FIXED = ("seed", "model", "precision", "data", "batch", "initial_weights", "freeze")
"""Sections that a run and its parent share."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint of another run, from which a run begins.

    Args:
        folder: the folder of its run.
        checkpoint: the checkpoint.
        step: the step after which it was saved.
        digest: SHA-256 of the checkpoint; of a sharded one, of its index, which has those of its files.
    """

    folder: RunFolder
    checkpoint: Path
    step: int
    digest: str

    def record(self) -> dict[str, Any]:
        """What the new run's provenance says about it."""
        return {
            "run": str(self.folder.path.resolve()),
            "checkpoint": str(self.checkpoint.resolve()),
            "step": self.step,
            "sha256": self.digest,
        }

    def start(self) -> Resume:
        """The checkpoint as a start of training, after a check of its content."""
        return read_start(self.checkpoint)


def parent_at(path: Path, recipe: Recipe, *, trust: bool) -> Parent:
    """Returns the parent that `--from` names, after a comparison of the two recipes.

    Raises:
        UserError: there is no checkpoint, or a key has changed that may not, or the run is not longer than its parent.
    """
    check_trained(RunFolder(path), "start a run from its weights with initial_weights")
    checkpoint = newest_checkpoint(path)
    folder = run_of(checkpoint)
    step = read_start(checkpoint).step
    parent = Parent(folder, checkpoint, step, _digest(checkpoint))
    _check_recipe(recipe, compose_run(folder.recipe, trust=trust, named=recipe.plugins), parent)
    return parent


def recorded_parent(folder: RunFolder) -> Parent | None:
    """Returns the parent that a run's provenance names; None: it has none.

    Raises:
        UserError: its checkpoint is gone, or has changed.
    """
    record = folder.read_provenance().get("parent")
    if record is None:
        return None
    try:
        checkpoint = Path(record["checkpoint"])
        parent = Parent(
            RunFolder(Path(record["run"])), checkpoint, int(record["step"]), str(record["sha256"])
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise UserError(f"{folder.provenance}: parent: is damaged") from cause
    if not is_checkpoint(checkpoint) or _digest(checkpoint) != parent.digest:
        why = "has changed" if is_checkpoint(checkpoint) else "is gone"
        raise UserError(
            f"--resume {folder.path}: {checkpoint}, from which the run began, {why}; start it again with --from"
        )
    return parent


def _digest(checkpoint: Path) -> str:
    return digest_of(checkpoint / INDEX if checkpoint.is_dir() else checkpoint)


def _check_recipe(recipe: Recipe, before: Recipe, parent: Parent) -> None:
    """Raises `UserError` for a key that may not change, and for a budget that ends where the parent has been."""
    where = f"--from {parent.folder.path}"
    check_tokenizer_unchanged(recipe, before, parent.folder, "--from")
    old = before.to_dict()
    new = recipe.to_dict()
    for values in (old, new):  # the documents decide, and the order of the data is compared below
        del values["data"]["corpus"], values["data"]["validation"]
        for key in ("file", "pattern"):
            values["data"]["tokenizer"].pop(key)
        values["optimizer"] = {"name": values["optimizer"]["name"]}
    sections = (*FIXED, "optimizer")
    difference = first_difference({k: old[k] for k in sections}, {k: new[k] for k in sections})
    if difference is not None:
        key, was, now = difference
        raise UserError(f"{where}: {key} = {now} here, and {was} there: {RULE}")
    plan = plan_of(recipe)
    if plan.steps <= parent.step:
        done = f"{plan.steps} steps in all, and {parent.step} are done"
        raise UserError(f"{where}: budget: {done}; the budget counts from the parent's first step")
    last = parent.step - 1
    read, other = plan.window(last), plan_of(before).window(last)
    if read != other:
        why = "the batch ramp would have read other data before the step from which the run begins"
        raise UserError(f"{where}: batch.accumulate: {why}")
