"""How a number changes over a run: one schedule for learning rates, batch sizes and coefficients.

A schedule is a start value and segments. Each segment ends at `until` and moves the value to `to` by
its shape. DeepSeek-V3's learning rate (report, section 4.2) reads:

    lr:
      unit: tokens
      start: 0.0
      segments:
        - {shape: linear, to: 2.2e-4, until: 8.4e9}
        - {shape: constant, until: 10e12}
        - {shape: cosine, to: 2.2e-5, until: 14.3e12}
        - {shape: constant, until: 14.633e12}
        - {shape: constant, to: 7.3e-6, until: 14.8e12}

The value that a step uses is the schedule's value at the *end* of that step: with a warm-up from 0 the
first step already moves, and the last step reaches the last value. A knot belongs to the segment that
ends there.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from core.contracts.errors import Wrong


@dataclass(frozen=True)
class Progress:
    """Where a run stands at the end of the step in question.

    Args:
        step: optimizer steps, this one included.
        tokens: training tokens, this step's included.
        total_steps: steps of the whole run.
        total_tokens: tokens of the whole run.
    """

    step: int
    tokens: int
    total_steps: int
    total_tokens: int

    def position(self, unit: str) -> float:
        """The position in one of a schedule's units."""
        if unit == "tokens":
            return float(self.tokens)
        if unit == "steps":
            return float(self.step)
        return self.tokens / self.total_tokens if self.total_tokens else 0.0


@dataclass(kw_only=True)
class Segment:
    """One piece of a schedule.

    Args:
        until: where it ends, in the schedule's unit.
        shape: `constant` holds `to` (or the value reached before), `linear` and `cosine` move to `to`.
        to: the value at the end; needed by `linear` and `cosine`.
    """

    until: float
    shape: Literal["constant", "linear", "cosine"] = "constant"
    to: float | None = None


@dataclass(kw_only=True)
class Schedule:
    """A value over a run; after the last segment it stays where it is.

    Args:
        unit: what `until` counts: a `fraction` of the run's tokens, `tokens`, or `steps`.
        start: the value before the first segment.
        segments: the pieces, in order.
    """

    start: float
    unit: Literal["fraction", "tokens", "steps"] = "fraction"
    segments: list[Segment] = field(default_factory=list)

    def at(self, progress: Progress) -> float:
        """The value at a position of the run."""
        position = progress.position(self.unit)
        value, begin = self.start, 0.0
        for segment in self.segments:
            target = value if segment.to is None else segment.to
            if position <= segment.until:
                return _between(segment.shape, value, target, (position - begin) / (segment.until - begin))
            value, begin = target, segment.until
        return value

    def values(self) -> list[float]:
        """Every value that a knot of this schedule names, for range checks."""
        return [self.start, *(segment.to for segment in self.segments if segment.to is not None)]

    def check(self, key: str) -> None:
        """Raises `Wrong` where the knots do not rise or a moving segment has no target."""
        begin = 0.0
        for index, segment in enumerate(self.segments):
            where = f"segment {index}"
            if not segment.until > begin:
                raise Wrong(key, f"{where} must end after {begin:g}, not at {segment.until:g}")
            if segment.shape != "constant" and segment.to is None:
                raise Wrong(key, f"{where} has shape {segment.shape} and needs a value `to`")
            begin = segment.until
        if self.unit == "fraction" and begin > 1:
            raise Wrong(key, f"fractions of a run end at 1, not at {begin:g}")


def _between(shape: str, start: float, end: float, fraction: float) -> float:
    if shape == "linear":
        return start + (end - start) * fraction
    if shape == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))
    return end


Scheduled = float | Schedule
"""The type of a setting that is a number or a schedule."""


def value_at(setting: Scheduled, progress: Progress) -> float:
    """The value of a scheduled setting at a position of the run."""
    return setting.at(progress) if isinstance(setting, Schedule) else float(setting)


def check_scheduled(setting: Scheduled, key: str, *, low: float, high: float = math.inf) -> None:
    """Raises `Wrong` unless every value of the setting lies in [low, high]."""
    values = [float(setting)] if not isinstance(setting, Schedule) else setting.values()
    if isinstance(setting, Schedule):
        setting.check(key)
    if any(not low <= value <= high for value in values):
        allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise Wrong(key, f"must be {allowed}")
