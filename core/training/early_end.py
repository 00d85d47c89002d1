"""Why a run ended before its budget was used up."""

from collections.abc import Iterable
from typing import Any


def why_ended(done: int, planned: int, callbacks: Iterable[Any]) -> str | None:
    """A sentence for the summary: which callback ended the run, and why; None if all its steps are done.

    Args:
        done: steps that are done.
        planned: steps of the budget.
        callbacks: the recipe's callbacks; one that ended the run has its reason in `end_reason`.
    """
    if done >= planned:
        return None
    reasons = [
        callback.end_reason for callback in callbacks if getattr(callback, "end_reason", None)
    ]
    why = "; ".join(reasons) or "a callback stopped the training"
    return (
        f"the run ended after {done} of {planned} steps: {why}. Runs of other lengths, and learning rates whose "
        "schedule did not end, are no fair comparison"
    )
