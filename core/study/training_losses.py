"""The training losses of a sweep's runs, each compared with the baseline's of the same seed."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.statistics.comparison import interval
from core.statistics.smoothing import largest, relative
from core.storage.documents import DocumentError, read_bytes
from core.training.metrics_file import METRICS

LOSS = "loss/next_token"
"""The column of `metrics.csv`: nats per token of the main model."""


def losses_by_step(run: Path, column: str = LOSS) -> dict[int, float]:
    """The training losses of a run by step, without values that are not finite, half written or damaged.

    Args:
        run: its folder; the losses are empty if it logged none, or the file cannot be read.
        column: a column of `metrics.csv`.
    """
    found: dict[int, float] = {}
    try:
        text = read_bytes(run / METRICS).decode("utf-8", "replace")
    except DocumentError:
        return {}
    with suppress(csv.Error):
        for row in csv.DictReader(io.StringIO(text, newline="")):
            try:
                step = int(float(row["step"]))
                loss = float(row[column])
            except (KeyError, OverflowError, TypeError, ValueError):
                continue
            if math.isfinite(loss):
                found[step] = loss
    return found


def against(base: Mapping[int, Path], mine: Mapping[int, Path]) -> dict[str, Any] | None:
    """The distance of the smoothed training loss from the baseline's, as fractions (see `core.statistics.smoothing`).

    Args:
        base, mine: finished runs by seed.

    Returns:
        `mean` over training and `last`, at the last step, each over the seeds with a 95% interval; `largest`: the
        largest absolute difference after the first tenth, of any seed. None if no seed is common.
    """
    curves = []
    for seed in sorted(base.keys() & mine.keys()):
        curve = relative(losses_by_step(mine[seed]), losses_by_step(base[seed]))
        if curve:
            curves.append(curve)
    if not curves:
        return None
    means = [sum(curve) / len(curve) for curve in curves]
    lasts = [curve[-1] for curve in curves]
    return {
        "mean": _spread(means),
        "last": _spread(lasts),
        "largest": max(map(largest, curves)),
        "n": len(curves),
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """The mean of the values with its interval."""
    found = interval(values)
    return {"value": found.mean, "low": found.low, "high": found.high}
