"""The smallest difference that a sweep could show: against published values, other formulas and a simulation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from core.contracts.errors import UserError
from core.statistics.comparison import ALPHA, holm
from core.statistics.power import (
    POWER,
    detection_probability,
    pooled_deviation,
    smallest_effect,
)
from core.study.expected import observed_difference, smallest_difference
from core.study.sweep_file import read_sweep

from .conftest import TWO, Write


@pytest.mark.parametrize(
    ("effect", "n", "power"),
    [
        (
            0.5,
            33.36713,
            0.8,
        ),  # R's pwr.t.test(d=0.5, power=0.8, type="paired"); statsmodels' TTestPower has the same
        (0.5, 34, 0.8077775),  # G*Power's matched pairs, dz = 0.5
    ],
)
def test_the_probability_is_the_published_one(effect: float, n: float, power: float) -> None:
    assert detection_probability(effect, n) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 34])
@pytest.mark.parametrize("comparisons", [1, 2, 9])
def test_the_probability_is_that_of_the_noncentral_t(n: int, comparisons: int) -> None:
    """Against scipy's distribution, above the critical value; below its negative there is nearly nothing left."""
    effect = smallest_effect(n, comparisons)
    assert effect is not None
    critical = stats.t.isf(ALPHA / comparisons / 2, n - 1)
    above = stats.nct.sf(critical, n - 1, effect * n**0.5)
    assert above == pytest.approx(POWER, abs=2e-6)
    assert detection_probability(effect, n, comparisons) == pytest.approx(POWER, abs=1e-8)


@pytest.mark.parametrize("comparisons", [1, 3])
def test_no_effect_is_shown_as_often_as_the_level_says(comparisons: int) -> None:
    for n in (2, 3, 8):
        found = detection_probability(0.0, n, comparisons)
        assert found == pytest.approx(ALPHA / comparisons, abs=1e-8)


def test_simulated_sweeps_show_the_smallest_difference_four_times_in_five() -> None:
    """Three variants of four seeds, of which one differs: its p after Holm's correction, as a sweep computes it."""
    draw = np.random.default_rng(3)
    effect = smallest_effect(4, 3)
    assert effect is not None
    differences = draw.normal(size=(4000, 3, 4))
    differences[:, 0] += effect
    t = differences.mean(axis=-1) / (differences.std(axis=-1, ddof=1) / 2)
    p = 2 * stats.t.sf(abs(t), 3)
    corrected = [holm(row)[0] for row in p.tolist()]
    shown = sum(value is not None and value < ALPHA for value in corrected) / len(corrected)
    assert shown == pytest.approx(POWER, abs=0.02)


def test_more_seeds_show_less_and_more_comparisons_need_more() -> None:
    by_seeds = [smallest_effect(n) for n in (2, 3, 5, 20)]
    by_comparisons = [smallest_effect(3, m) for m in (1, 2, 12)]
    assert by_seeds == sorted(by_seeds, reverse=True)
    assert by_comparisons == sorted(by_comparisons)
    assert by_seeds[1] == pytest.approx(3.264, abs=1e-3)
    assert smallest_effect(1) is None
    assert smallest_effect(3, 0) is None


def test_a_deviation_is_pooled_around_the_means_of_its_groups() -> None:
    """(2 + 8) squares over (1 + 2) degrees of freedom."""
    assert pooled_deviation([[1.0, 3.0], [10.0, 12.0, 14.0], [7.0]]) == pytest.approx(
        (10 / 3) ** 0.5
    )
    assert pooled_deviation([[1.0], []]) is None


def sentence(write: Write, more: str = "", text: str = TWO) -> str:
    """The sentence on the smallest difference of a sweep file with further keys."""
    sweep = read_sweep(write(text + more))
    found = smallest_difference(sweep.schema, len(sweep.variants), sweep.expected)
    return str(found["sentence"])


def test_without_a_deviation_the_difference_is_in_its_units(write: Write) -> None:
    assert sentence(write) == (
        "2 seeds, 1 comparison: a difference of at least 12 sd of the paired differences; "
        "power 80%, two-sided 5% with Holm's correction"
    )


def test_with_a_deviation_the_difference_is_in_the_metric(write: Write) -> None:
    assert sentence(write, "expected_sd: 0.01\n").startswith(
        "2 seeds, 1 comparison: a difference in val_bits_per_byte of at least 0.115 (12 sd of 0.01, from expected_sd);"
    )


def test_one_seed_and_one_variant_show_nothing(write: Write) -> None:
    one_seed = TWO.replace("seeds: [3, 4]", "seeds: [3]")
    alone = TWO.replace("  none: {{overrides: {{model.blocks.moe.ffn.balance: []}}}}\n", "")
    assert sentence(write, text=one_seed) == "1 seed: no difference can be shown, whatever its size"
    assert sentence(write, text=alone) == "2 seeds: nothing is compared"


def earlier(folder: Path, **changes: Any) -> Path:
    """A folder with the results of an earlier sweep, whose differences are 1 and 3."""
    runs = {
        "a": [{"seed": 0, "value": 1.0}, {"seed": 1, "value": 2.0}],
        "b": [{"seed": 0, "value": 2.0}, {"seed": 1, "value": 5.0}, {"seed": 2, "value": None}],
    }
    rows = [{"variant": name, "runs": own} for name, own in runs.items()]
    document = {"metric": "val_bits_per_byte", "baseline": "a", "rows": rows, **changes}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_the_deviation_is_taken_from_an_earlier_sweep(write: Write, tmp_path: Path) -> None:
    earlier(tmp_path / "before")
    sweep = read_sweep(write(TWO + "expected_sd: before\n"))
    assert sweep.expected is not None
    assert sweep.expected.deviation == pytest.approx(2**0.5)
    assert sweep.expected.source == "the differences in before"


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({"metric": "val_loss"}, "before", "that sweep compares val_loss, and this one val_bits"),
        ({"rows": []}, "before", "no variant there has two pairs of runs whose differences spread"),
        ({"rows": [3, {"runs": [3]}]}, "before", "no variant there has two pairs of runs"),
        ({}, "nowhere", "must be a number, or an earlier sweep's folder with a results.json"),
        ({}, "0", "must be above 0, or a sweep's folder"),
        ({}, "-0.1", "must be above 0, or a sweep's folder"),
        ({}, ".nan", "must be finite"),
        ({}, ".inf", "must be finite"),
    ],
)
def test_a_deviation_that_cannot_be_right_is_one_sentence(
    write: Write, tmp_path: Path, changes: dict[str, Any], given: str, expected: str
) -> None:
    earlier(tmp_path / "before", **changes)
    with pytest.raises(UserError) as error:
        read_sweep(write(TWO + f"expected_sd: {given}\n"))
    assert "expected_sd" in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_the_observed_difference_takes_the_deviation_that_was_found() -> None:
    effect = smallest_effect(3, 2)
    assert effect is not None
    assert observed_difference([0.1, 0.2, 0.3], 2) == pytest.approx(0.1 * effect)
    assert observed_difference([0.1], 2) is None
    assert observed_difference([0.1, 0.1], 2) is None
