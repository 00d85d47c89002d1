"""The two loaders that Lightning iterates: windows to train on, and the validation stream."""

from bisect import bisect_right
from collections.abc import Iterator
from math import ceil

import numpy as np

from core.data.batch import Batch
from core.data.mixture_order import MixtureOrder
from core.data.parts import parts_of
from core.data.sequences import Sequences, sequences_of
from core.data.store import TokenStore
from core.data.windows import cut, rows_of, sequences_at, source_ranges
from core.recipe.plan import TrainingPlan


class WindowLoader:
    """A run's training data: one item is the window of micro-batches that one optimizer step reads.

    Iterating continues from the loader's state, the step that is read next; it advances when a window is handed out.
    Lightning fetches nothing ahead from a loader that has a length, so a checkpoint taken after step k holds k + 1
    and a resumed run reads exactly the windows that are left. A checkpoint taken during step k would hold k + 1 as
    well, so checkpoints are saved between steps.

    Args:
        store: the training stream.
        plan: how many steps, and which micro-batches each reads; also S sequences and L tokens.
        seed: the seed of the order.
        rank: the data rank of this process.
        world: how many data ranks there are; must divide S.
        order: the order of a mixture; None: all sequences of the stream, shuffled in each epoch.
        shift_step: the number of steps that read the stream before its `shift`; None: it has one part.
        sequences: the sequences of the stream, with a stretch for each part; None: they are cut out of it.

    Raises:
        UserError: the stream, or a part of it, is shorter than one sequence, or `world` does not divide S.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        plan: TrainingPlan,
        seed: int,
        rank: int = 0,
        world: int = 1,
        order: MixtureOrder | None = None,
        shift_step: int | None = None,
        sequences: Sequences | None = None,
    ) -> None:
        self.plan = plan
        self.step = 0
        if sequences is None:
            sequences = sequences_of(
                store, plan.length, by_source=order is not None, shifts=shift_step is not None
            )
        self._sequences = sequences
        self._seed = seed
        self._order = order
        self._parts = parts_of(sequences, plan, shift_step)
        self._rows = np.array(rows_of(rank, world, plan.sequences))

    def micro_batch(self, index: int) -> Batch:
        """This rank's rows of micro-batch `index` of the run: B = S / world sequences of L tokens."""
        if self._order is not None:
            positions_B = index * self.plan.sequences + self._rows
            return self._sequences.cut(*self._order.places(positions_B))
        number = bisect_right(self._parts, index, key=lambda part: part.first) - 1
        part = self._parts[number]
        positions_B = (index - part.first) * self.plan.sequences + self._rows
        sequences_B = sequences_at(positions_B, self._seed, part.count, number)
        return self._sequences.cut(np.full_like(sequences_B, number), sequences_B)

    def window(self, step: int) -> list[Batch]:
        """The micro-batches that optimizer step `step`, counted from 0, reads."""
        window = self.plan.window(step)
        return [self.micro_batch(window.first + index) for index in range(window.count)]

    def __iter__(self) -> Iterator[list[Batch]]:
        while self.step < self.plan.steps:
            window = self.window(self.step)
            self.step += 1
            yield window

    def __len__(self) -> int:
        """The number of steps of the whole run, however many have been read."""
        return self.plan.steps

    def state_dict(self) -> dict[str, int]:
        """The step that is read next."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues with the step that a checkpoint names."""
        self.step = state["step"]


class ValidationLoader:
    """The whole validation stream once, in order, in sequences that do not overlap.

    Every token but the first marker is predicted exactly once, of a mixture the first marker of every part. Where the
    stream, a part of it or the last batch is not full, the rest is padding, so that all ranks see the same number of
    batches of the same shape.

    Args:
        store: the validation stream.
        length: L, tokens in a sequence.
        sequences: S, sequences in a batch, all data ranks together.
        rank: the data rank of this process.
        world: how many data ranks there are; must divide S.
        by_source: whether no sequence reaches from one source into the next.

    Raises:
        UserError: `world` does not divide S.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        length: int,
        sequences: int,
        rank: int = 0,
        world: int = 1,
        by_source: bool = False,
    ) -> None:
        self._store = store
        self._length = length
        self._sequences = sequences
        self._rows = np.array(rows_of(rank, world, sequences))
        ranges = source_ranges(store) if by_source else [(0, len(store))]
        begins = [np.arange(begin, end - 1, length) for begin, end in ranges]
        ends = [np.full(len(own), end) for own, (_, end) in zip(begins, ranges, strict=True)]
        self._begins = np.concatenate(begins)
        self._ends = np.concatenate(ends)

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            sequences_B = batch * self._sequences + self._rows
            exists_B = sequences_B < len(self._begins)
            nearest_B = np.minimum(sequences_B, len(self._begins) - 1)
            begins_B = np.where(exists_B, self._begins[nearest_B], len(self._store))
            ends_B = np.where(exists_B, self._ends[nearest_B], len(self._store))
            yield cut(self._store, begins_B, self._length, ends_B)

    def __len__(self) -> int:
        """The number of batches of S sequences; the last may be padded."""
        return ceil(len(self._begins) / self._sequences)
