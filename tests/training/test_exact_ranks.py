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
from exact_cases import FP64, LENGTHS, RECOMPUTE, TIED, Case, cases, compare
from lab import Lab
from observed_run import observe
from test_batch_split import METHODS, overrides
from test_ranks import EVERY_SCOPE
from test_window import cut, padded

from core.testing.forked_ranks import on_ranks
from core.training.launchers import Launch

QUICK = [
    Case("fsdp", 2, (RECOMPUTE, TIED)),
    Case("experts", 1, (RECOMPUTE,)),
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


UNDER_TEST = {
    "ddp": "{name: ddp, ranks: 2}",
    "fsdp": "{name: fsdp, ranks: 2, reshard_after_forward: false}",
    "experts": "{name: expert_parallel, expert_ranks: 2}",
}
"""Strategies of two ranks, the first of which the others are compared with."""


@pytest.mark.full
def test_every_method_is_the_same_under_every_strategy(lab: Lab) -> None:
    """Every router, balancer and drop, also those whose result depends on how a batch is split over ranks."""
    methods = {name: (FP64, *overrides(name)) for name in METHODS}
    methods["losses over every scope"] = EVERY_SCOPE
    windows = [cut(padded(lengths, seed), [4, 4]) for seed, lengths in enumerate(LENGTHS[:2])]
    validation = [padded([16, 0, 5, 16], 7)]

    def work(rank: int) -> dict[tuple[str, str], dict[str, Any]]:
        launch = Launch(rank, 2, "torchrun", port=1, local_rank=rank)
        seen = {}
        for method, keys in methods.items():
            for name, section in UNDER_TEST.items():
                strategy = f"strategy={section}"
                run = observe(lab, windows, validation, *keys, strategy, launch=launch)
                seen[method, name] = asdict(run)
        return seen

    with tempfile.TemporaryDirectory() as folder:
        by_rank = on_ranks(work, Path(folder), world=2)
    for rank, seen in enumerate(by_rank):
        for method in methods:
            for name in ("fsdp", "experts"):
                where = f"{method}, {name}, rank {rank}"
                compare(where, seen[method, "ddp"], seen[method, name], is_first=rank == 0)
