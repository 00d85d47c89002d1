"""Ratios of pairs: order of the turns, the interval of the median, and when rounds end."""

import itertools
import statistics

import pytest
import torch

from core.speed import turns as turns_module
from core.speed.turns import Turns, in_turns
from core.statistics.median import half_width, median_interval

CPU = torch.device("cpu")


def least_cover(n: int, rank: int) -> float:
    """The probability that the rank-th smallest and largest of n values enclose the median, over all 2^n sides."""
    inside = 0
    for sides in itertools.product((0, 1), repeat=n):  # 1: the value is below the median
        inside += rank <= sum(sides) <= n - rank
    return inside / 2**n


@pytest.mark.parametrize("n", range(1, 15))
def test_the_interval_of_a_median_is_the_narrowest_that_keeps_its_level(n: int) -> None:
    values = [float(index) for index in reversed(range(n))]
    ranks = [rank for rank in range(1, n // 2 + 1) if least_cover(n, rank) >= 0.95]
    expected = None
    if ranks:
        expected = (float(max(ranks) - 1), float(n - max(ranks)))
    assert median_interval(values) == expected
    if expected is None:
        assert half_width(values) == float("inf")
    elif statistics.median(values):
        low, high = expected
        assert half_width(values) == (high - low) / 2 / statistics.median(values)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is twice as slow in every other round changes no ratio."""
    slow = [1.0, 2.0] * 5
    found = Turns({"ours": [0.5 * by for by in slow], "theirs": [0.8 * by for by in slow]})
    ratio = found.ratio("ours", "theirs")
    assert ratio.median == pytest.approx(1.6)
    assert ratio.interval == pytest.approx([1.6, 1.6])
    assert ratio.rounds == 10
    few = Turns({"ours": [1.0, 1.0], "theirs": [2.0, 4.0]}).ratio("ours", "theirs")
    assert (few.median, few.interval) == (3.0, None)


def test_the_order_is_reversed_from_round_to_round_and_warming_up_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    clock = itertools.count()

    def timed(work: object, device: object) -> float:
        work()  # type: ignore[operator]
        return 1.0 + next(clock)

    monkeypatch.setattr(turns_module, "seconds_of", timed)
    versions = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    found = in_turns(versions, CPU, seconds=0.0, fewest=3, warm_up=1)
    assert called == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert found.seconds == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_rounds_end_once_the_interval_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "seconds_of", lambda work, device: 1.0)
    found = in_turns({"a": int, "b": int}, CPU, seconds=60.0, fewest=3)
    assert len(found.seconds["a"]) == 6  # fewer have no interval
