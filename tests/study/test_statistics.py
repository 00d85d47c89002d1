"""Intervals, paired differences and Holm's correction against values computed elsewhere, and what they promise."""

import math
import random
from collections.abc import Sequence

import pytest
from scipy import stats

from core.statistics.comparison import (
    NOT_AFTER_HOLM,
    NOTHING_SHOWN,
    Difference,
    Interval,
    compare,
    holm,
    interval,
    paired,
    verdict,
)

BASE = {0: 2.31, 1: 2.35, 2: 2.28, 3: 2.40, 4: 2.33}
MINE = {0: 2.27, 1: 2.34, 2: 2.25, 3: 2.31, 4: 2.30}


def test_an_interval_by_hand() -> None:
    """Mean 3, deviation sqrt(2.5), t(4 degrees, 0.975) = 2.776445."""
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert (found.n, found.mean) == (5, 3.0)
    assert found.low == pytest.approx(3 - half, abs=1e-6)
    assert found.high == pytest.approx(3 + half, abs=1e-6)


def test_an_interval_as_scipy_has_it() -> None:
    values = list(BASE.values())
    found = interval(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)


def test_one_value_has_no_interval() -> None:
    assert interval([2.5]) == Interval(1, 2.5, None, None)


def test_a_difference_is_that_of_a_paired_t_test() -> None:
    found = paired(BASE, MINE)
    assert found is not None
    expected = stats.ttest_rel(list(MINE.values()), list(BASE.values()))
    span = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.interval.low, found.interval.high) == pytest.approx((span.low, span.high))
    assert found.interval.mean == pytest.approx(-0.04)
    # the differences -.04 -.01 -.03 -.09 -.03: mean -.04, squares around it .0036 over 4
    assert found.effect_size == pytest.approx(-0.04 / 0.03)


def test_only_common_seeds_are_paired() -> None:
    assert paired({0: 1.0, 1: 2.0, 7: 99.0}, {1: 2.5, 0: 1.25, 8: -99.0}) == paired(
        {0: 1.0, 1: 2.0}, {0: 1.25, 1: 2.5}
    )
    assert paired({0: 1.0}, {1: 2.0}) is None


def test_one_common_seed_has_a_difference_and_nothing_else() -> None:
    found = paired({0: 1.0}, {0: 1.5, 1: 3.0})
    assert found == Difference(Interval(1, 0.5, None, None), None, None)
    assert verdict(found, None, "lower") is None


@pytest.mark.parametrize(
    ("step", "p", "expected"),
    [
        (0.0, 1.0, NOTHING_SHOWN),
        (1e-15, 1.0, NOTHING_SHOWN),
        (0.5, 0.0, "worse"),
        (0.1, 0.0, "worse"),
    ],
)  # 0.1 differs from itself by rounding
def test_equal_differences_have_no_spread_to_divide_by(
    step: float, p: float, expected: str
) -> None:
    """A variant that is 0.5 worse with every seed is worse: p is what it tends to as the spread does to 0."""
    base = {seed: 1.3 * seed + 0.7 for seed in range(4)}
    found = paired(base, {seed: value + step for seed, value in base.items()})
    assert found is not None
    assert (found.effect_size, found.p) == (None, p)
    assert found.interval.mean == pytest.approx(step, abs=1e-14)
    assert verdict(found, found.p, "lower") == expected


def test_holm_by_hand() -> None:
    """Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 and .04, which may not be less than .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_counts_only_what_has_a_p_and_stays_at_most_one() -> None:
    assert holm([None, 0.02, None, 0.9]) == pytest.approx([None, 0.04, None, 0.9])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "p", "better", "expected"),
    [
        (-0.2, -0.1, 0.04, "lower", "better"),
        (-0.2, -0.1, 0.04, "higher", "worse"),
        (0.1, 0.2, 0.04, "lower", "worse"),
        (0.1, 0.2, 0.04, "higher", "better"),
        (-0.1, 0.2, 0.04, "lower", NOTHING_SHOWN),
        (0.0, 0.2, 0.04, "lower", NOTHING_SHOWN),
        (-0.2, 0.0, 0.04, "lower", NOTHING_SHOWN),
        (0.1, 0.2, 0.05, "lower", NOT_AFTER_HOLM),
        (-0.2, -0.1, 0.3, "higher", NOT_AFTER_HOLM),
        (0.1, 0.2, 0.0499, "lower", "worse"),
    ],
)
def test_the_words(low: float, high: float, p: float, better: str, expected: str) -> None:
    assert (
        verdict(Difference(Interval(5, (low + high) / 2, low, high), 1.0, p), p, better) == expected
    )


def test_the_words_themselves() -> None:
    assert NOTHING_SHOWN == "no difference shown"
    assert NOT_AFTER_HOLM == "not shown after Holm's correction"


def test_a_correction_can_take_a_difference_away() -> None:
    """Alone the variant differs; among four, of which the others show nothing, it does not."""

    def moved(*shifts: float) -> dict[int, float]:
        return {
            seed: value + shift for (seed, value), shift in zip(BASE.items(), shifts, strict=True)
        }

    mine = moved(0.01, 0.03, 0.00, 0.04, 0.03)
    others = {
        "a": moved(0.02, -0.01, 0.01, -0.02, 0.0),
        "b": moved(-0.02, 0.02, 0.01, 0, 0),
        "c": moved(0, 0, 0, 0, 0),
    }
    alone = compare({"base": BASE, "mine": mine}, "base", "lower")["mine"]
    among = compare({"base": BASE, "mine": mine, **others}, "base", "lower")["mine"]
    assert alone is not None
    assert among is not None
    assert alone["p_holm"] == alone["p"] == among["p"] == pytest.approx(0.0402, abs=1e-4)
    assert among["p_holm"] == pytest.approx(4 * among["p"])
    assert (alone["verdict"], among["verdict"]) == ("worse", NOT_AFTER_HOLM)
    assert among["low"] > 0


def test_every_key_of_a_comparison() -> None:
    found = compare({"base": BASE, "mine": MINE, "lost": {}, "one": {0: 2.0}}, "base", "lower")
    assert found["base"] is None
    assert found["lost"] is None
    assert found["mine"] is not None
    assert set(found["mine"]) == {
        "n",
        "mean",
        "low",
        "high",
        "effect_size",
        "p",
        "p_holm",
        "verdict",
    }
    assert found["one"] is not None
    assert (found["one"]["n"], found["one"]["verdict"], found["one"]["p_holm"]) == (1, None, None)


def test_a_baseline_without_results_compares_nothing() -> None:
    assert compare({"base": {}, "mine": MINE}, "base", "lower") == {"base": None, "mine": None}


def within(count: int, trials: int, rate: float) -> bool:
    """Whether a count is within three standard deviations of a binomial's mean."""
    return abs(count - rate * trials) <= 3 * math.sqrt(trials * rate * (1 - rate))


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(n: int) -> None:
    draw, trials, held = random.Random(n), 4000, 0
    for _ in range(trials):
        found = interval([draw.gauss(2.3, 0.1) for _ in range(n)])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2.3 <= found.high
    assert within(held, trials, 0.95)


def test_five_variants_that_are_all_the_same_are_rarely_reported_apart() -> None:
    """Holm keeps the chance of any wrong word at 5% at most; with a baseline in common it is a little less."""
    draw, trials, wrong = random.Random(1), 400, 0
    names = ["base", *"abcde"]
    for _ in range(trials):
        values = {name: {seed: draw.gauss(2.3, 0.1) for seed in range(5)} for name in names}
        verdicts: Sequence[object] = [
            row["verdict"] for row in compare(values, "base", "lower").values() if row
        ]
        wrong += any(word in ("better", "worse") for word in verdicts)
    assert wrong <= 0.05 * trials + 3 * math.sqrt(trials * 0.05 * 0.95)
