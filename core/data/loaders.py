"""The two loaders that Lightning iterates: windows to train on, and the validation stream."""

from collections.abc import Iterator
from math import ceil

import numpy as np

from core.data.batch import Batch
from core.data.store import TokenStore
from core.data.windows import count_sequences, cut, rows_of, sequences_at
from core.recipe.plan import Plan


class WindowLoader:
    """A run's training data: one item is the window of micro-batches that one optimizer step reads.

    The loader is a bookmark. Iterating goes on from the step where it stands; its state is that step, which moves
    on *as* a window is handed out. Lightning fetches nothing ahead from a loader that has a length, so a
    checkpoint taken after step k holds k + 1 and a resumed run reads exactly the windows that are left.
    One taken *inside* step k would hold k + 1 as well: save between steps.

    Args:
        store: the training stream.
        plan: how many steps, and which micro-batches each reads; also S sequences and L tokens.
        seed: what the order is drawn from.
        rank: this process among the data ranks.
        world: how many data ranks there are; must divide S.

    Raises:
        UserError: the stream is shorter than one sequence, or `world` does not divide S.
    """

    def __init__(self, store: TokenStore, *, plan: Plan, seed: int, rank: int = 0, world: int = 1) -> None:
        self.plan = plan
        self.step = 0
        self._store, self._seed = store, seed
        self._count = count_sequences(store, plan.length)
        self._rows = np.array(rows_of(rank, world, plan.sequences))

    def micro_batch(self, index: int) -> Batch:
        """This rank's rows of micro-batch `index` of the run: B = S / world sequences of L tokens."""
        sequences_B = sequences_at(index * self.plan.sequences + self._rows, self._seed, self._count)
        return cut(self._store, sequences_B * self.plan.length, self.plan.length)

    def window(self, step: int) -> list[Batch]:
        """What optimizer step `step`, counted from 0, reads."""
        window = self.plan.window(step)
        return [self.micro_batch(window.first + index) for index in range(window.count)]

    def __iter__(self) -> Iterator[list[Batch]]:
        while self.step < self.plan.steps:
            window = self.window(self.step)
            self.step += 1
            yield window

    def __len__(self) -> int:
        """Steps of the whole run, whatever has been read of it."""
        return self.plan.steps

    def state_dict(self) -> dict[str, int]:
        """The step that is read next."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where a checkpoint stood."""
        self.step = state["step"]


class ValidationLoader:
    """The validation stream once through, in order, in sequences that do not overlap.

    Every token but the first marker is predicted exactly once. Where the stream or the last batch is not full,
    the rest is padding, so that all ranks see the same number of batches of the same shape.

    Args:
        store: the validation stream.
        length: L, tokens in a sequence.
        sequences: S, sequences in a batch, all data ranks together.
        rank: this process among the data ranks.
        world: how many data ranks there are; must divide S.

    Raises:
        UserError: `world` does not divide S.
    """

    def __init__(self, store: TokenStore, *, length: int, sequences: int, rank: int = 0, world: int = 1) -> None:
        self._store, self._length, self._sequences = store, length, sequences
        self._rows = np.array(rows_of(rank, world, sequences))

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            yield cut(self._store, (batch * self._sequences + self._rows) * self._length, self._length)

    def __len__(self) -> int:
        """Batches of S sequences; the last may be padded."""
        sequences = ceil((len(self._store) - 1) / self._length)
        return ceil(sequences / self._sequences)
