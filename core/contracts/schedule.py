"""How a number changes over a run: one schedule for learning rates, batch sizes and coefficients.

A schedule is a start value and segments. Each segment ends at `until` and moves the value to `to` by
its shape. DeepSeek-V3's learning rate (report, section 4.2) reads:

    lr:
      unit: tokens
      start: 0.0
      segments:
        - {shape: linear, to: 2.2e-4, until: 28e9}       # 2,000 steps of the batch ramp
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
from typing import Any, Literal

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

    def values(self) -> dict[str, float]:
        """Every value that this schedule names, by its key path in it, for range checks."""
        targets = {f"segments.{i}.to": s.to for i, s in enumerate(self.segments) if s.to is not None}
        return {"start": self.start, **targets}

    def check(self, parent: Any = None) -> None:
        """Raises `Wrong` where the knots do not rise, leave the run, or a moving segment has no target."""
        begin = 0.0
        for index, segment in enumerate(self.segments):
            where = f"segments.{index}"
            if not begin < segment.until < math.inf:
                raise Wrong(f"{where}.until", f"must be more than {begin:g}, where the segment begins")
            if self.unit == "fraction" and segment.until > 1:
                raise Wrong(f"{where}.until", "must be at most 1, the end of the run (unit: fraction)")
            if segment.shape != "constant" and segment.to is None:
                raise Wrong(f"{where}.to", f"must be given where the shape is {segment.shape}")
            begin = segment.until


def _between(shape: str, start: float, end: float, fraction: float) -> float:
    if shape == "linear":
        return start * (1.0 - fraction) + end * fraction  # exact at both ends
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
    if isinstance(setting, Schedule):
        try:
            setting.check()
        except Wrong as wrong:
            raise Wrong(f"{key}.{wrong.key}", wrong.why) from wrong
        values = {f"{key}.{where}": value for where, value in setting.values().items()}
    else:
        values = {key: float(setting)}
    for where, value in values.items():
        if not low <= value <= high or math.isinf(value):
            allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise Wrong(where, "must be finite" if value == math.inf else f"must be {allowed}")
