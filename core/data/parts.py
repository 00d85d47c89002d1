"""The parts of a training stream whose data shift in the middle of a run.

Each part has its own endless line of epochs, from its first sequence on. A run reads part 0 for a number of steps
and part 1 afterwards, so the part of a micro-batch follows from its number alone: a run resumes, and any number of
ranks reads the same batches, as without a shift. No sequence reaches over the boundary.
"""

from dataclasses import dataclass

from core.contracts.errors import UserError
from core.data.sequences import Sequences
from core.recipe.plan import TrainingPlan


@dataclass(frozen=True)
class Part:
    """A stretch of the training stream, and when it is read.

    Args:
        count: the number of its sequences.
        first: the micro-batch of the run with which it begins.
    """

    count: int
    first: int


def step_of_shift(shift_at: float | None, steps: int) -> int | None:
    """The number of steps before the shift of the data, the nearest to the fraction; None without a shift.

    Raises:
        UserError: the run is so short that one side of the shift would have no step.
    """
    if shift_at is None:
        return None
    step = round(shift_at * steps)
    if not 0 < step < steps:
        side = "after" if step else "before"
        raise UserError(
            f"the data shift at {shift_at:g} of the run, and of its {steps} steps none is {side} it"
        )
    return step


def parts_of(sequences: Sequences, plan: TrainingPlan, shift_step: int | None) -> list[Part]:
    """The parts of a training stream in the order in which they are read: one, or two.

    Args:
        sequences: those of the stream, of two stretches where it has a shift.
        plan: the micro-batches of each step.
        shift_step: the number of steps that read part 0; None: the stream has one part.
    """
    counts = sequences.counts.tolist()
    if shift_step is None or len(counts) == 1:
        return [Part(sum(counts), 0)]
    first = plan.window(shift_step).first
    return [Part(counts[0], 0), Part(counts[1], first)]
