"""One, two and four gloo ranks compute what one process computes on the same global batch, under every strategy.

Compared in fp64 to 1e-9: losses, gradients, gradient norm, bias updates, loads, load metrics, validation, weights and
optimizer state after the steps, and the text that the model writes. Ranks have unequal numbers of valid tokens, one has
none, and one expert has no token; the multi-token module has experts too.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from exact_cases import RECOMPUTE, TIED, Case, cases, compare
from lab import Lab

from core.testing.forked_ranks import on_ranks
from core.training.launchers import Launch

QUICK = [
    Case("fsdp", 2, (RECOMPUTE, TIED)),
    Case("experts", 1, (RECOMPUTE,)),
    Case("nodes of one rank", 2),
]
"""The cases of the default tier, on two ranks."""


def check(lab: Lab, world: int, chosen: list[Case]) -> None:
    """Trains every case on ranks of one process group, and compares each rank with one process."""

    def work(rank: int) -> list[dict[str, Any]]:
        launch = Launch(rank, world, "torchrun", port=1, local_rank=rank)
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


def test_two_ranks_are_exact(lab: Lab) -> None:
    check(lab, 2, QUICK)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_strategy_is_exact(lab: Lab, world: int) -> None:
    check(lab, world, cases(world))
