"""What a summary says of a run whose data shift: how its load took it."""

import math
from pathlib import Path
from typing import Any

from core.statistics.recovery import recovery
from core.storage.documents import DocumentError
from core.training.metrics_file import METRICS, STEP, read_metrics

VIOLATION = "load/max_vio_batch"
"""The column of `metrics.csv`: MaxVio of each step."""

KEYS = (
    "shift_step",
    "max_vio_before_shift",
    "max_vio_peak_after_shift",
    "steps_until_balanced",
    "balanced_again",
)
"""The keys that a summary has only if the data shift."""


def after_shift(run: Path, shift: int, last: int) -> dict[str, Any]:
    """The keys of `summary.json` on the shift of the data.

    They are null, but for the step of the shift, without routed experts, where `metrics.csv` does not have every
    step, or where too few steps come after the shift (`core.statistics.recovery`).

    Args:
        run: the run folder.
        shift: the number of steps before the shift.
        last: the last step.
    """
    found = recovery(_violations(run), shift, last)
    if found is None:
        return {**dict.fromkeys(KEYS), "shift_step": shift}
    return {
        "shift_step": shift,
        "max_vio_before_shift": found.before,
        "max_vio_peak_after_shift": found.peak,
        "steps_until_balanced": found.steps,
        "balanced_again": found.balanced,
    }


def _violations(run: Path) -> dict[int, float]:
    """MaxVio of each step that the run has logged, without values that are not finite."""
    try:
        file = read_metrics(run / METRICS)
    except DocumentError:
        return {}
    violations: dict[int, float] = {}
    for row in file.rows if file else []:
        try:
            value = float(row.get(VIOLATION) or "nan")
        except ValueError:
            continue
        if math.isfinite(value):
            violations[int(row[STEP])] = value
    return violations
