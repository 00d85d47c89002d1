"""The training losses of a sweep's runs, each held against the baseline's of the same seed."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.statistics.comparison import interval
from core.statistics.smoothing import largest, relative

LOSS = "loss/next_token"
"""The column of `metrics.csv`: nats per token of the main model."""


def losses(run: Path, column: str = LOSS) -> dict[int, float]:
    """A training loss by step; empty where a run logged none, without what is not finite or half written."""
    found: dict[int, float] = {}
    try:
        with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    step, loss = int(float(row["step"])), float(row[column])
                except (KeyError, TypeError, ValueError):
                    continue
                if math.isfinite(loss):
                    found[step] = loss
    except OSError:
        return {}
    return found


def against(base: Mapping[int, Path], mine: Mapping[int, Path]) -> dict[str, Any] | None:
    """How far the smoothed training loss lies from the baseline's, as fractions (see `core.statistics.smoothing`).

    Args:
        base, mine: finished runs by seed.

    Returns:
        `mean` over training and `last`, at the last step, each over the seeds with a 95% interval; `largest`: the
        largest size after the first tenth, of any seed. None where no seed is common.
    """
    curves = [relative(losses(mine[seed]), losses(base[seed])) for seed in sorted(base.keys() & mine.keys())]
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    means, lasts = [sum(curve) / len(curve) for curve in curves], [curve[-1] for curve in curves]
    return {"mean": _spread(means), "last": _spread(lasts), "largest": max(map(largest, curves)), "n": len(curves)}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    found = interval(values)
    return {"value": found.mean, "low": found.low, "high": found.high}
