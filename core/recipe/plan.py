"""The plan of a run: how many steps it has, and which micro-batches each step reads.

One optimizer step reads a *window* of micro-batches; a micro-batch holds `sequences` sequences over all
data ranks together. The number of micro-batches in a window may follow a schedule (a batch ramp), so the
plan is worked out once, before anything starts: it also fixes the token positions that every schedule reads.
"""

from dataclasses import dataclass

from core.contracts.schedule import Progress, Schedule, Scheduled, value_at


@dataclass(frozen=True)
class WindowSpan:
    """The micro-batches [first, first + count) that one optimizer step reads."""

    first: int
    count: int


class TrainingPlan:
    """The steps of a run.

    Args:
        sequences: sequences in a micro-batch, all data ranks together.
        length: tokens in a sequence.
        micro_batches: micro-batches per step: a number, or a schedule that is rounded.
        steps: the run's length in steps, or
        tokens: its length in tokens (the last step may pass it).
    """

    def __init__(
        self,
        *,
        sequences: int,
        length: int,
        micro_batches: Scheduled,
        steps: int | None = None,
        tokens: int | None = None,
    ) -> None:
        self.sequences = sequences
        self.length = length
        per_micro = sequences * length
        self._ends: list[int] | None = None
        if isinstance(micro_batches, Schedule):
            self._ends = _ramp(micro_batches, per_micro, steps, tokens)
            self.steps = len(self._ends)
        else:
            self._size = int(micro_batches)
            if steps is None:
                steps = -(-int(tokens or 0) // (self._size * per_micro))
            self.steps = steps
        self.micro_batches = 0
        if self.steps:
            last = self.window(self.steps - 1)
            self.micro_batches = last.first + last.count
        self.tokens = self.micro_batches * per_micro

    def window(self, step: int) -> WindowSpan:
        """Returns the micro-batches of step `step`, counted from 0."""
        if self._ends is None:
            return WindowSpan(step * self._size, self._size)
        first = self._ends[step - 1] if step else 0
        return WindowSpan(first, self._ends[step] - first)

    def progress(self, step: int) -> Progress:
        """Returns the position of the run at the end of step `step`, counted from 0."""
        window = self.window(step)
        tokens = (window.first + window.count) * self.sequences * self.length
        return Progress(
            step=step + 1, tokens=tokens, total_steps=self.steps, total_tokens=self.tokens
        )


def _ramp(schedule: Schedule, per_micro: int, steps: int | None, tokens: int | None) -> list[int]:
    """The number of micro-batches read by the end of every step of a batch ramp.

    The ramp is evaluated at the position where the step *begins*: a step's size cannot depend on where it ends. A ramp
    in fractions of the run needs a budget in tokens.
    """
    ends: list[int] = []
    read = 0

    def is_done() -> bool:
        if steps is not None:
            return len(ends) >= steps
        return read * per_micro >= int(tokens or 0)

    while not is_done():
        begin = Progress(len(ends), read * per_micro, steps or 0, tokens or 0)
        read += _window_size(schedule, begin)
        ends.append(read)
    return ends


def _window_size(schedule: Schedule, progress: Progress) -> int:
    return max(1, round(value_at(schedule, progress)))
