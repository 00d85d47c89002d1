"""Compares what the ranks of a run are about to train, and with which code: files may differ between machines."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from core.contracts.errors import UserError
from core.training.ranks import all_ranks


@dataclass(frozen=True)
class Start:
    """What a rank is about to train.

    Args:
        node: the number of its node.
        step: the step after which it continues; 0 at the start of a run.
        recipe: the hash of its recipe.
        data: the hash of its training data.
        code: its version of moeloom, with a hash of the source.
        torch: its version of torch.
    """

    node: int
    step: int
    recipe: str
    data: str
    code: str
    torch: str


class SameStart(L.Callback):
    """Ends a run before its first step if the ranks differ in checkpoint, recipe, data, code or version of torch.

    Args:
        start: what this rank is about to train.
        folder: the run folder.
    """

    def __init__(self, start: Start, folder: Path) -> None:
        self.start = start
        self.folder = folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gathers the starts of all ranks.

        Raises:
            UserError: one differs from that of the first rank; raised on every rank.
        """
        world = all_ranks()[1]
        if world == 1:
            return
        starts: list[Any] = [None] * world
        dist.all_gather_object(starts, self.start)
        found = first_difference(starts, self.folder)
        if found is not None:
            raise UserError(found)


def first_difference(starts: Sequence[Start], folder: Path) -> str | None:
    """The sentence about the first rank that starts otherwise than rank 0; None if all start alike."""
    first = starts[0]
    for rank, start in enumerate(starts):
        who = f"rank {rank} on node {start.node}"
        if start.torch != first.torch:
            why = f"has torch {start.torch}, and rank 0 has torch {first.torch}"
            return f"{who} {why}: all nodes must have the same packages"
        if start.code != first.code:
            why = f"runs moeloom {start.code}, and rank 0 runs {first.code}"
            return f"{who} {why}: all nodes must have the same code, that of plugins included"
        if start.step != first.step:
            why = f"would continue after step {start.step}, and rank 0 after step {first.step}"
            return f"{folder}: {who} {why}: all nodes must see the same run folder, on a shared file system"
        if start.recipe != first.recipe:
            return f"{who} has read another recipe than rank 0: all nodes must have the same recipe files"
        if start.data != first.data:
            return f"{who} has read other training data than rank 0: all nodes must have the same corpus"
    return None


def hash_of(values: Any) -> str:
    """The SHA-256 of plain containers."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
