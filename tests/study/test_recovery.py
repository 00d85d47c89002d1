"""Steps until the load is balanced again after a shift of the data: by hand, and sweeps that cannot have them."""

from typing import Any

import pytest

from core.contracts.errors import UserError
from core.statistics.comparison import CENSORED, compare
from core.statistics.recovery import LEVEL, MARGIN, WINDOW, recovery
from core.study.matching import match
from core.study.results import withhold_verdicts
from core.study.sweep_file import read_sweep

from .conftest import TWO, Write


def violations(before: list[float], after: list[float]) -> dict[int, float]:
    """MaxVio by step, counted from 1."""
    return dict(enumerate([*before, *after], start=1))


def test_the_level_before_is_the_mean_of_the_last_quarter() -> None:
    values = violations([9.0] * 6 + [0.1, 0.3], [0.2] * WINDOW)
    found = recovery(values, 8, 8 + WINDOW)
    assert LEVEL == 0.25
    assert found is not None
    assert found.before == pytest.approx(0.2)
    assert (found.steps, found.balanced) == (0, True)


@pytest.mark.parametrize("high", [0, 1, 7, 30])
def test_the_steps_are_those_before_the_first_balanced_window(high: int) -> None:
    """After `high` steps far from balance no window that has one of them is balanced."""
    after = [50.0] * high + [1.0] * 40
    found = recovery(violations([1.0] * 8, after), 8, 8 + len(after))
    assert found is not None
    assert (found.steps, found.balanced) == (high, True)
    assert found.peak == pytest.approx((min(high, WINDOW) * 50 + max(0, WINDOW - high)) / WINDOW)


def test_the_margin_counts() -> None:
    for factor, balanced in ((1 + MARGIN - 0.01, True), (1 + MARGIN + 0.01, False)):
        found = recovery(violations([1.0] * 4, [factor] * WINDOW), 4, 4 + WINDOW)
        assert found is not None
        assert found.balanced is balanced


def test_a_run_that_is_never_balanced_again_is_censored_at_its_number_of_windows() -> None:
    found = recovery(violations([1.0] * 4, [3.0] * 60), 4, 64)
    assert found is not None
    assert (found.steps, found.balanced) == (60 - WINDOW + 1, False)


def test_what_is_missing_is_not_guessed() -> None:
    whole = violations([1.0] * 8, [1.0] * 40)
    assert recovery(whole, 8, 48) is not None
    assert recovery({step: value for step, value in whole.items() if step != 30}, 8, 48) is None
    assert recovery({step: value for step, value in whole.items() if step != 8}, 8, 48) is None
    assert recovery(whole, 8, 8 + WINDOW - 1) is None, "no whole window comes after the shift"
    assert recovery({}, 8, 48) is None


TEXTS = "{{name: files, paths: [texts/*.txt]}}"
SHIFTING = TWO.replace(
    "budget: {{steps: 2}}", "metric: steps_until_balanced\nbudget: {{steps: 40}}"
)
SHIFTING += f"overrides: {{{{data.corpus: {{{{name: shift, first: {TEXTS}, then: {TEXTS}}}}}}}}}\n"


def refused(text: str, write: Write) -> str:
    """The error message of a sweep whose variants cannot have its metric."""
    with pytest.raises(UserError) as caught:
        match(read_sweep(write(text)))
    return str(caught.value)


def test_a_sweep_that_logs_only_some_steps_is_refused(write: Write) -> None:
    changed = "overrides: {{trainer.log_every_n_steps: 2, data.corpus"
    text = SHIFTING.replace("overrides: {{data.corpus", changed)
    assert text != SHIFTING
    assert refused(text, write).endswith(
        "metric = 'steps_until_balanced': bias has trainer.log_every_n_steps = 2, "
        "and every step is needed: it must be 1"
    )


def test_a_sweep_has_it_where_a_whole_window_comes_after_the_shift(write: Write) -> None:
    assert match(read_sweep(write(SHIFTING))).documents["bias"]["steps"] == 2 * WINDOW
    assert refused(SHIFTING.replace("steps: 40", "steps: 39"), write).endswith(
        "metric = 'steps_until_balanced': bias has 19 of its 39 steps after the shift of its data, "
        "and a window of 20 is the least"
    )
    message = refused(SHIFTING.replace("steps: 40", "steps: 1"), write)
    assert message.endswith("of its 1 steps none is before it")


def test_a_sweep_without_a_shift_cannot_have_it(write: Write) -> None:
    text = SHIFTING[: SHIFTING.index("overrides: {{data")]
    assert refused(text, write).endswith(
        "bias, none cannot have it without a corpus whose data shift"
    )


STEPS = {"sign": (40.0, 44.0, 41.0), "quantile": (3.0, 5.0, 2.0), "loss": (70.0, 81.0, 66.0)}


def results_with(censored: str) -> list[dict[str, Any]]:
    """Rows of `results.json` in which the second run of one variant is censored."""
    values = {name: dict(enumerate(steps)) for name, steps in STEPS.items()}
    differences = compare(values, "sign", "lower")
    rows = []
    for name, steps in STEPS.items():
        runs = [{"seed": seed, "value": value} for seed, value in enumerate(steps)]
        if name == censored:
            runs[1]["censored"] = True
        row = {"variant": name, "runs": runs, "mean": sum(steps) / 3, "low": 0.0, "high": 99.0}
        rows.append({**row, "difference": differences[name], "smallest_difference": 4.0})
    return rows


@pytest.mark.parametrize(
    ("censored", "withheld"), [("loss", {"loss"}), ("sign", {"quantile", "loss"}), ("", set())]
)
def test_a_lower_bound_is_compared_with_nothing(censored: str, withheld: set[str]) -> None:
    rows = results_with(censored)
    warnings = withhold_verdicts(rows, "sign")
    plain = {row["variant"]: row for row in results_with("")}
    for row in rows:
        name = row["variant"]
        assert row["mean"] == plain[name]["mean"]
        assert (row["low"] is None) == (row["high"] is None) == (name == censored)
        if name not in withheld:
            assert row["difference"] == plain[name]["difference"]
            continue
        kept = {key: value for key, value in row["difference"].items() if value is not None}
        assert kept.pop("verdict") == CENSORED
        assert kept.items() <= plain[name]["difference"].items()
        assert not {"p", "p_holm", "low", "high", "effect_size"} & kept.keys()
        assert row["smallest_difference"] is None
    bound = STEPS[censored][1] if censored else 0
    expected = f"{censored}, seed 1: not balanced again before the end: at least {bound:g} steps"
    assert [line.partition(",")[0] for line in warnings] == [censored] * bool(censored)
    assert all(line.startswith(expected) for line in warnings)
