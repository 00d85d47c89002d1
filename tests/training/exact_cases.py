"""Training runs whose results must not depend on the number of ranks: the cases, and how they are compared.

`test_exact_ranks.py` runs them on gloo ranks. On a machine with GPUs they run in two steps, because a process that has
a process group cannot train alone:

    python tests/training/exact_cases.py alone FOLDER
    torchrun --nproc-per-node 2 tests/training/exact_cases.py ranks FOLDER
"""

import os
import pickle
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import Lab
from observed_run import Observed, differences, observe
from test_window import cut, padded

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

    @property
    def file(self) -> str:
        """The name of the file with what one process computes."""
        return f"{self.accumulate}-{'-'.join(self.more) or 'plain'}.pickle"

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


def compare(where: str, one: dict[str, Any], other: dict[str, Any], *, is_first: bool) -> float:
    """The largest difference; raises an AssertionError for one above 1e-9, and for any integer that differs."""
    largest = 0.0
    for step in other["steps"]:
        moved = [name for name in step if name.startswith("exchange/")]
        for name in moved:
            step.pop(name)
    parts = ["steps", "loads", "gradients", "validated", "text"]
    if is_first:
        parts += ["state", "optimizer"]
    for part in parts:
        found = differences(one[part], other[part])
        largest = max([largest, *(size for size, _ in found)])
        far = [pair for pair in found if pair[0] > CLOSE]
        assert not far, f"{where}: {part}: {sorted(far, reverse=True)[:5]}"
    return largest


def main() -> None:
    """Runs every case alone, or on the ranks of torchrun and compares them with what was found alone."""
    mode, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(folder)
    if mode == "alone":
        for case in {(c.accumulate, c.more): c for c in cases(2)}.values():
            (folder / case.file).write_bytes(pickle.dumps(asdict(case.run(lab, None))))
        return
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(rank)
    dist.init_process_group(backend)
    launch = Launch(rank, world, "torchrun", port=1, local_rank=rank)
    for case in cases(launch.world):
        seen = asdict(case.run(lab, launch))
        one = pickle.loads((folder / case.file).read_bytes())
        largest = compare(f"{case}, rank {rank}", one, seen, is_first=rank == 0)
        print(f"rank {rank}, {case}: largest difference {largest:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
