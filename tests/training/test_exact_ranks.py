"""One, two and four gloo ranks compute what one process computes on the same global batch, under every strategy.

Compared in fp64 to 1e-9: losses, gradients, gradient norm, bias updates, loads, load metrics, validation, weights and
optimizer state after the steps, and the text that the model writes. Ranks have unequal numbers of valid tokens, one has
none, and one expert has no token; the multi-token module has experts too.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from lab import Lab
from observed_run import Observed, differences, observe
from test_window import cut, padded

from core.testing.forked_ranks import on_ranks
from core.training.launchers import Launch

CLOSE = 1e-9
FP64 = "precision.name=fp64"
TIED = "model.tied_embedding=true"
RECOMPUTE = "recompute.blocks=[dense, moe]"
LENGTHS = ([16, 3, 9, 0, 1, 12, 16, 7], [0, 0, 16, 16, 5, 6, 7, 16], [16] * 8)
"""The valid tokens of the eight sequences of each window; in the second one the first of four ranks has none."""

STRATEGIES = {
    "ddp": "{name: ddp, ranks: WORLD}",
    "fsdp": "{name: fsdp, ranks: WORLD}",
    "experts": "{name: expert_parallel, expert_ranks: WORLD}",
    "experts of two nodes": "{name: expert_parallel, expert_ranks: WORLD, ranks_per_node: 2}",
    "experts and data": "{name: expert_parallel, expert_ranks: 2, ranks: WORLD}",
    "nodes of one rank": "{name: expert_parallel, expert_ranks: WORLD, ranks_per_node: 1}",
}
OF_FOUR = ("experts of two nodes", "experts and data")
"""Strategies that need four ranks."""


@dataclass(frozen=True)
class Case:
    """A training run on several ranks.

    Args:
        strategy: a key of `STRATEGIES`.
        accumulate: micro-batches of a window.
        more: further overrides.
    """

    strategy: str
    accumulate: int
    more: tuple[str, ...] = ()

    def run(self, lab: Lab, launch: Launch | None) -> Observed:
        """Trains, on this rank of several or alone."""
        share = [8 // self.accumulate] * self.accumulate
        windows = [cut(padded(lengths, seed), share) for seed, lengths in enumerate(LENGTHS)]
        validation = [padded([16, 0, 5, 16], 7), padded([1, 16, 0, 0], 8)]
        overrides = [FP64, *self.more]
        if launch is not None:
            section = STRATEGIES[self.strategy].replace("WORLD", str(launch.world))
            overrides.append(f"strategy={section}")
        return observe(lab, windows, validation, *overrides, launch=launch)


def cases(world: int) -> list[Case]:
    """Every strategy that `world` ranks can have, with and without accumulation, recomputation and a tied embedding."""
    found = []
    for strategy in STRATEGIES:
        if strategy in OF_FOUR and world != 4:
            continue
        for accumulate in (1, 2):
            for more in ((), (RECOMPUTE,), (TIED, RECOMPUTE)):
                found.append(Case(strategy, accumulate, more))
    return found


QUICK = [
    Case("ddp", 1),
    Case("fsdp", 2, (RECOMPUTE, TIED)),
]
"""The cases of the default tier, on two ranks."""


def check(lab: Lab, world: int, chosen: list[Case]) -> None:
    """Trains every case on ranks of one process group, and compares each rank with one process."""

    def work(rank: int) -> list[dict[str, Any]]:
        launch = Launch(rank, world, launcher="torchrun", port=1)
        return [asdict(case.run(lab, launch)) for case in chosen]

    with tempfile.TemporaryDirectory() as folder:
        by_rank = on_ranks(work, Path(folder), world=world)
    alone: dict[tuple[Any, ...], dict[str, Any]] = {}
    for index, case in enumerate(chosen):
        key = (case.accumulate, case.more)
        if key not in alone:
            alone[key] = asdict(case.run(lab, None))
        for rank, seen in enumerate(results[index] for results in by_rank):
            compare(f"{case}, rank {rank}", alone[key], seen, is_first=rank == 0)


def compare(where: str, one: dict[str, Any], other: dict[str, Any], *, is_first: bool) -> None:
    """Raises an AssertionError for any number that differs by more than 1e-9, and for any integer that differs."""
    for step in other["steps"]:
        moved = [name for name in step if name.startswith("exchange/")]
        for name in moved:
            step.pop(name)
    parts = ["steps", "loads", "gradients", "validated", "text"]
    if is_first:
        parts += ["state", "optimizer"]
    for part in parts:
        far = [found for found in differences(one[part], other[part]) if found[0] > CLOSE]
        assert not far, f"{where}: {part}: {sorted(far, reverse=True)[:5]}"


def test_two_ranks_are_exact(lab: Lab) -> None:
    check(lab, 2, QUICK)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_strategy_is_exact(lab: Lab, world: int) -> None:
    check(lab, world, cases(world))
