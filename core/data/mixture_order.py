"""The order in which a run reads a mixture: which part each sequence comes from, and which of its sequences.

Positions are dealt out in cycles of `CYCLE`. In a cycle each part has its exact share, spread evenly, so that every
stretch of positions has nearly the shares of the weights. Each part has its own endless line of epochs. As for one
corpus, every place is arithmetic on (seed, position).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.contracts.errors import UserError

CYCLE = 10_000
"""Positions after which the order of the parts repeats; also the resolution of weights."""

EPOCHS_KEPT = 2
"""Orders of epochs of each part that are kept: a batch may reach into the next epoch."""


class MixtureOrder:
    """The sequences of a mixture by their position.

    Args:
        names: the names of the parts, for error messages.
        weights: the share of each, together 1.
        counts: how many sequences each part has.
        length: tokens in a sequence.
        seed: the seed of the order.

    Raises:
        UserError: a part is shorter than one sequence.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        counts: NDArray[np.int64],
        length: int,
        seed: int,
    ) -> None:
        self._seed = seed
        self.counts = counts
        for name, count in zip(names, self.counts, strict=True):
            if count < 1:
                raise UserError(
                    f"the part {name!r} of the mixture is too short: one sequence of "
                    f"data.sequence_length = {length} needs {length + 1} tokens"
                )
        self._quotas = quotas_of(weights)
        self._parts, self._ranks = _cycle(self._quotas)
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def places(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The part of each position, and the number of the sequence in its part."""
        cycles, places = np.divmod(positions, CYCLE)
        parts = self._parts[places]
        ordinals = cycles * self._quotas[parts] + self._ranks[places]
        chosen = np.empty_like(positions)
        for index, (part, ordinal) in enumerate(
            zip(parts.tolist(), ordinals.tolist(), strict=True)
        ):
            epoch, place = divmod(ordinal, int(self.counts[part]))
            chosen[index] = self._order(part, epoch)[place]
        return parts, chosen

    def epochs(self, positions: int) -> list[float]:
        """How often each part is read in the first positions."""
        cycles, rest = divmod(positions, CYCLE)
        parts = len(self._quotas)
        read = cycles * self._quotas + np.bincount(self._parts[:rest], minlength=parts)
        return [float(epochs) for epochs in read / self.counts]

    def _order(self, part: int, epoch: int) -> NDArray[np.int64]:
        """A permutation of a part's sequences, fixed by (seed, epoch, part)."""
        if (part, epoch) not in self._orders:
            own = [key for key in self._orders if key[0] == part]
            if len(own) == EPOCHS_KEPT:
                del self._orders[own[0]]
            seeds = np.random.SeedSequence(self._seed, spawn_key=(epoch, part))
            words = np.random.PCG64(seeds).random_raw(int(self.counts[part]))
            self._orders[part, epoch] = np.argsort(words, kind="stable")
        return self._orders[part, epoch]


def quotas_of(weights: Sequence[float]) -> NDArray[np.int64]:
    """The positions of a cycle that each part has: its weight rounded, and together `CYCLE`."""
    exact = np.array(weights) * CYCLE
    quotas: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    missing = CYCLE - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return quotas


def _cycle(quotas: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The part of each position of a cycle, and which of the part's positions it is."""
    parts = np.repeat(np.arange(len(quotas)), quotas)
    ranks = np.concatenate([np.arange(quota) for quota in quotas])
    times = (ranks + 0.5) / quotas[parts]
    order = np.lexsort((parts, times))
    return parts[order], ranks[order]
