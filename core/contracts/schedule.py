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

A warm-up, a stable rate and a decay (WSD: MiniCPM, arXiv 2404.06395; the decay by 1 - sqrt: arXiv 2405.18392) can also
be written by its lengths, whatever the length of the run:

    lr: {unit: steps, wsd: {peak: 3.0e-3, warmup: 2000, decay: 10000, shape: 1-sqrt}}

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

    def end(self, unit: str) -> float:
        """The end of the run in one of a schedule's units."""
        return {"tokens": float(self.total_tokens), "steps": float(self.total_steps)}.get(unit, 1.0)


@dataclass(kw_only=True)
class Segment:
    """One piece of a schedule.

    Args:
        until: where it ends, in the schedule's unit.
        shape: `constant` holds `to` (or the value reached before); `linear`, `cosine` and `1-sqrt` move to `to`.
        to: the value at the end; needed by every shape that moves.
    """

    until: float
    shape: Literal["constant", "linear", "cosine", "1-sqrt"] = "constant"
    to: float | None = None


@dataclass(kw_only=True)
class WarmupStableDecay:
    """A linear warm-up from 0, a constant value, and a decay that ends where the run ends.

    Args:
        peak: the constant value.
        warmup: the length of the warm-up, in the schedule's unit.
        decay: the length of the decay, likewise.
        shape: the shape of the decay.
        final: the value at the end of the run.
    """

    peak: float
    warmup: float = 0.0
    decay: float
    shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    final: float = 0.0

    def segments(self, end: float) -> list[Segment]:
        """The segments of a run that ends at `end`; in one too short for both, the decay begins after the warm-up."""
        found: list[Segment] = []
        if self.warmup > 0:
            found.append(Segment(until=self.warmup, shape="linear", to=self.peak))
        if end - self.decay > self.warmup:
            found.append(Segment(until=end - self.decay, to=self.peak))
        if end > self.warmup:
            found.append(Segment(until=end, shape=self.shape, to=self.final))
        return found

    def check(self, parent: Any = None) -> None:
        """Raises `ConfigError` for lengths that are negative or not finite, and for a decay of no length."""
        for key in ("warmup", "decay"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(key, "must be at least 0 and finite")
        if not self.decay:
            raise ConfigError("decay", "must be more than 0")


@dataclass(kw_only=True)
class Schedule:
    """A value over a run; after the last segment it stays where it is.

    Args:
        unit: what `until` and the lengths of `wsd` count: a `fraction` of the run's tokens, `tokens`, or `steps`.
        start: the value before the first segment; required without `wsd`.
        segments: the pieces, in order.
        wsd: warm-up, stable value and decay, instead of `start` and `segments`.
    """

    start: float | None = None
    unit: Literal["fraction", "tokens", "steps"] = "fraction"
    segments: list[Segment] = field(default_factory=list)
    wsd: WarmupStableDecay | None = None

    def at(self, progress: Progress) -> float:
        """The value at a position of the run."""
        position = progress.position(self.unit)
        segments, value = self.segments, self.start
        if self.wsd is not None:
            segments = self.wsd.segments(progress.end(self.unit))
            value = 0.0 if self.wsd.warmup > 0 else self.wsd.peak
        assert value is not None
        begin = 0.0
        for segment in segments:
            target = value if segment.to is None else segment.to
            if position <= segment.until:
                fraction = (position - begin) / (segment.until - begin)
                return _between(segment.shape, value, target, fraction)
            value = target
            begin = segment.until
        return value

    def values(self) -> dict[str, float]:
        """Every value that this schedule names, by its key path inside the schedule, for range checks."""
        if self.wsd is not None:
            return {"wsd.peak": self.wsd.peak, "wsd.final": self.wsd.final}
        assert self.start is not None
        named = {"start": self.start}
        for index, segment in enumerate(self.segments):
            if segment.to is not None:
                named[f"segments.{index}.to"] = segment.to
        return named

    def check(self, parent: Any = None) -> None:
        """Raises `ConfigError` if the knots do not rise, leave the run, or a moving segment has no target."""
        if self.wsd is not None:
            self._check_wsd(self.wsd)
            return
        if self.start is None:
            raise ConfigError("start", "must be given, unless wsd is")
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

    def _check_wsd(self, wsd: WarmupStableDecay) -> None:
        """Raises `ConfigError` for further keys beside `wsd`, and for lengths that do not fit into a run."""
        for key, value in (("start", self.start), ("segments", self.segments or None)):
            if value is not None:
                raise ConfigError(key, "must not be given beside wsd, which says it all")
        try:
            wsd.check()
        except ConfigError as error:
            raise ConfigError(f"wsd.{error.key}", error.why) from error
        if self.unit == "fraction" and wsd.warmup + wsd.decay > 1:
            left = f"must be at most {1 - wsd.warmup:g}, what the warm-up leaves of the run"
            key = "warmup" if wsd.warmup >= 1 else "decay"
            raise ConfigError(f"wsd.{key}", left if key == "decay" else "must be less than 1")


def _between(shape: str, start: float, end: float, fraction: float) -> float:
    if shape == "linear":
        return start * (1.0 - fraction) + end * fraction  # exact at both ends
    if shape == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))
    if shape == "1-sqrt":
        return end + (start - end) * (1.0 - math.sqrt(fraction))
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
