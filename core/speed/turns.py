"""Measures versions of one work in turns, and compares them pair by pair.

Versions that are compared run once in each round, in an order that is reversed from round to round (A B B A). A ratio
is taken within a round, so that other work on the machine slows both of its sides, and the median of the ratios is the
result. Rounds are added until the interval of that median is narrow, or the time is over.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from core.statistics.median import LEVEL, half_width, median_interval

INTERVAL = f"{LEVEL:.0%} interval of the median, by order statistics"
"""What the ends of an interval are, as rows of the measurements say it."""

NARROW = 0.01
"""Half of an interval, as a fraction of the median, at which no more rounds are added."""

FEWEST_ROUNDS = 8
MOST_ROUNDS = 200


@dataclass(frozen=True)
class Ratio:
    """How often one version does the work of another one in the same time.

    Args:
        median: the median over the rounds.
        low, high: the ends of its interval; None where there are too few rounds.
        rounds: how many were measured.
    """

    median: float
    low: float | None
    high: float | None
    rounds: int

    @property
    def interval(self) -> list[float] | None:
        """The two ends, None if there are none."""
        if self.low is None or self.high is None:
            return None
        return [self.low, self.high]


@dataclass
class Turns:
    """Seconds of each version in each round.

    Args:
        seconds: a list by version, an entry for each round.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median time of a version."""
        return median(self.seconds[name])

    def ratios(self, name: str, other: str) -> list[float]:
        """The speed of `name` over that of `other` in each round that both have."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=False)
        return [theirs / ours for ours, theirs in pairs]

    def ratio(self, name: str, other: str) -> Ratio:
        """The median of the paired ratios, with its interval."""
        found = self.ratios(name, other)
        low, high = median_interval(found) or (None, None)
        return Ratio(median(found), low, high, len(found))

    def fastest(self, names: list[str]) -> str:
        """The version with the least median time."""
        return min(names, key=self.median)


def wait(device: torch.device) -> None:
    """Waits until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """The wall time of one call, from an idle device to an idle device."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def in_turns(
    versions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float,
    fewest: int = FEWEST_ROUNDS,
    warm_up: int = 1,
    reference: str | None = None,
) -> Turns:
    """Runs all versions in turns.

    Args:
        versions: the work of each version, by its name.
        device: where it is done.
        seconds: no round begins after this time, unless there are fewer than `fewest`.
        fewest: rounds that are measured in any case.
        warm_up: rounds beforehand that do not count.
        reference: a version: rounds end when its ratios to all others have narrow intervals. None: the first one.
    """
    names = list(versions)
    reference = reference or names[0]
    others = [name for name in names if name != reference]
    found = Turns({name: [] for name in names})
    began = time.monotonic()
    for turn in range(-warm_up, MOST_ROUNDS):
        order = names if turn % 2 == 0 else names[::-1]
        for name in order:
            spent = seconds_of(versions[name], device)
            if turn >= 0:
                found.seconds[name].append(spent)
        if turn + 1 < fewest:
            continue
        widths = [half_width(found.ratios(reference, other)) for other in others]
        if time.monotonic() - began > seconds or max(widths, default=0.0) < NARROW:
            break
    return found
