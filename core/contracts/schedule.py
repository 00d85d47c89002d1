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

from core.contracts.errors import ConfigError
from core.contracts.schema import setting


@dataclass(frozen=True)
class Progress:
    """The position of a run at the end of a step.

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
        if self.total_tokens:
            return self.tokens / self.total_tokens
        return 0.0


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
        value = self.start
        begin = 0.0
        for segment in self.segments:
            target = value if segment.to is None else segment.to
            if position <= segment.until:
                fraction = (position - begin) / (segment.until - begin)
                return _between(segment.shape, value, target, fraction)
            value = target
            begin = segment.until
        return value

    def values(self) -> dict[str, float]:
        """Every value that this schedule names, by its key path inside the schedule, for range checks."""
        named = {"start": self.start}
        for index, segment in enumerate(self.segments):
            if segment.to is not None:
                named[f"segments.{index}.to"] = segment.to
        return named

    def check(self, parent: Any = None) -> None:
        """Raises `ConfigError` if the knots do not rise, leave the run, or a moving segment has no target."""
        begin = 0.0
        for index, segment in enumerate(self.segments):
            where = f"segments.{index}"
            if math.isinf(segment.until):
                raise ConfigError(f"{where}.until", "must be finite")
            if not begin < segment.until:
                why = f"must be more than {begin:g}, where the segment begins"
                raise ConfigError(f"{where}.until", why)
            if self.unit == "fraction" and segment.until > 1:
                why = "must be at most 1, the end of the run (unit: fraction)"
                raise ConfigError(f"{where}.until", why)
            if segment.shape != "constant" and segment.to is None:
                why = f"must be given if the shape is {segment.shape}"
                raise ConfigError(f"{where}.to", why)
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
    if isinstance(setting, Schedule):
        return setting.at(progress)
    return float(setting)


def check_scheduled(setting: Scheduled, key: str, *, low: float, high: float = math.inf) -> None:
    """Raises `ConfigError` unless every value of the setting lies in [low, high]."""
    if isinstance(setting, Schedule):
        try:
            setting.check()
        except ConfigError as error:
            raise ConfigError(f"{key}.{error.key}", error.why) from error
        values = {f"{key}.{where}": value for where, value in setting.values().items()}
    else:
        values = {key: float(setting)}
    for where, value in values.items():
        if not low <= value <= high or math.isinf(value):
            why = f"must be at least {low:g}"
            if value == math.inf:
                why = "must be finite"
            elif high != math.inf and value > high and high > 1:
                why = f"must be at most {high:.10g}"
            elif high != math.inf and high <= 1:
                why = f"must be between {low:g} and {high:g}"
            raise ConfigError(where, why)


@dataclass(kw_only=True)
class LearningRateSettings:
    """The learning rate of an optimizer: derive its `Config` from this class."""

    lr: Scheduled = setting(doc="learning rate")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a rate that is negative or not finite anywhere in the run; it may be 0."""
        check_scheduled(self.lr, "lr", low=0)
