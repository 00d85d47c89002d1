"""The time left: worked out by hand for a few runs and places."""

import pytest

from core.study.pace import Pace


class Clock:
    """Seconds that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_said_before_a_run_has_reported_the_speed(clock: Clock) -> None:
    pace = Pace({"a": 1.0, "b": 1.0}, 1, clock)
    pace.begin("a", fresh=True)
    assert pace.left() is None
    clock.now += 5
    pace.end("a", whole=False)
    assert pace.left() is None  # it crashed


def test_runs_beside_each_other_end_together(clock: Clock) -> None:
    """Fifteen runs on fifteen places: when the first is done the others nearly are, and not fourteen runs away."""
    names = [f"run-{index}" for index in range(15)]
    pace = Pace(dict.fromkeys(names, 2.0), 15, clock)
    for name in names:
        pace.begin(name, fresh=True)
    clock.now += 200
    pace.end("run-0", whole=True)
    assert pace.left() == 0
    clock.now += 10
    assert pace.left() == 0


def test_time_goes_with_the_work_and_places_are_filled_in_order(clock: Clock) -> None:
    """Two places, one second a unit: a (10) and b (30) begin, c (20) and d (5) wait.

    At 10 a ends and c takes its place until 30; b ends at 30, d begins then: 25 seconds are left.
    """
    pace = Pace({"a": 10.0, "b": 30.0, "c": 20.0, "d": 5.0}, 2, clock)
    pace.begin("a", fresh=True)
    pace.begin("b", fresh=True)
    clock.now += 10
    pace.end("a", whole=True)
    assert pace.left() == 25
    pace.begin("c", fresh=True)
    clock.now += 22  # b takes longer than it should
    assert pace.left() == 5


def test_what_an_earlier_runner_began_reports_no_speed(clock: Clock) -> None:
    pace = Pace({"a": 10.0, "b": 10.0, "c": 10.0}, 1, clock)
    pace.begin("a", fresh=False)
    clock.now += 1
    pace.end("a", whole=True)
    assert pace.left() is None
    pace.begin("b", fresh=True)
    clock.now += 20
    pace.end("b", whole=True)
    assert pace.left() == 20
