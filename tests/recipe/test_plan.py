"""The steps of a run: constant windows, and DeepSeek-V3's ramp of 3072 to 15360 sequences over 469B tokens (A19)."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

from core.analysis.budget import plan_of
from core.contracts.schedule import Schedule, Segment
from core.recipe.compose import compose
from core.recipe.plan import TrainingPlan, WindowSpan

LENGTH = 4096


@pytest.mark.parametrize(("sequences", "size", "steps"), [(1, 1, 1), (4, 1, 7), (8, 3, 5)])
def test_a_constant_plan_by_steps(sequences: int, size: int, steps: int) -> None:
    plan = TrainingPlan(sequences=sequences, length=16, micro_batches=size, steps=steps)
    assert (plan.steps, plan.micro_batches, plan.tokens) == (
        steps,
        size * steps,
        size * steps * sequences * 16,
    )
    assert [plan.window(step) for step in range(steps)] == [
        WindowSpan(size * step, size) for step in range(steps)
    ]
    assert plan.progress(0).step == 1
    assert plan.progress(steps - 1).tokens == plan.tokens


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (383, 1), (384, 1), (385, 2), (768, 2), (769, 3), (38_400, 100)]
)
@pytest.mark.parametrize("size", [3, 3.0, Schedule(start=3)], ids=["int", "float", "schedule"])
def test_a_budget_in_tokens_is_rounded_up_to_whole_steps(
    tokens: int, steps: int, size: float | Schedule
) -> None:
    plan = TrainingPlan(
        sequences=8, length=16, micro_batches=size, tokens=tokens
    )  # 384 tokens a step
    assert (plan.steps, plan.tokens) == (steps, steps * 384)


def test_a_ramp_in_steps_reads_the_position_where_each_step_begins() -> None:
    ramp = Schedule(start=1, unit="steps", segments=[Segment(until=4, shape="linear", to=5)])
    plan = TrainingPlan(sequences=2, length=8, micro_batches=ramp, steps=7)
    assert [plan.window(step).count for step in range(7)] == [1, 2, 3, 4, 5, 5, 5]
    assert [plan.window(step).first for step in range(7)] == [0, 1, 3, 6, 10, 15, 20]
    assert (plan.micro_batches, plan.tokens) == (25, 25 * 16)


def test_a_ramp_is_rounded_to_whole_micro_batches_and_never_empty() -> None:
    ramp = Schedule(start=0.2, unit="steps", segments=[Segment(until=4, shape="linear", to=2.2)])
    plan = TrainingPlan(
        sequences=1, length=1, micro_batches=ramp, steps=6
    )  # 0.2, 0.7, 1.2, 1.7, 2.2, 2.2
    assert [plan.window(step).count for step in range(6)] == [1, 1, 1, 2, 2, 2]


def test_a_ramp_in_fractions_of_a_token_budget() -> None:
    ramp = Schedule(start=1, segments=[Segment(until=0.5), Segment(until=1, to=2)])
    plan = TrainingPlan(sequences=1, length=10, micro_batches=ramp, tokens=100)
    # 10 tokens a step while the step begins in the first half (a knot is its last), then 20
    assert [plan.window(step).count for step in range(plan.steps)] == [1] * 6 + [2, 2]
    assert (plan.tokens, plan.steps) == (100, 8)


SEQUENCES = 3
RAMP = Schedule(start=1024, unit="tokens", segments=[Segment(until=469e9, shape="linear", to=5120)])


@pytest.fixture(scope="module")
def v3() -> TrainingPlan:
    """The whole run, in micro-batches of 3 sequences."""
    return TrainingPlan(
        sequences=SEQUENCES, length=LENGTH, micro_batches=RAMP, tokens=14_800_000_000_000
    )


def test_A19_the_batch_goes_from_3072_to_15360_sequences_over_469B_tokens(v3: TrainingPlan) -> None:
    assert v3.window(0) == WindowSpan(0, 1024)
    for step in range(0, 16_000, 7):
        window = v3.window(step)
        begin = window.first * SEQUENCES * LENGTH
        assert window.count == (5120 if begin > 469e9 else round(1024 + 4096 * begin / 469e9))
    assert v3.window(v3.steps - 1).count * SEQUENCES == 15360
    full = next(step for step in range(v3.steps) if v3.window(step).count == 5120)
    begins = v3.window(full).first * SEQUENCES * LENGTH
    assert begins == pytest.approx(469e9 * (4095.5 / 4096), rel=2e-4), (
        "rounding brings the last size half a micro-batch early"
    )


def test_A19_the_run_ends_with_the_first_step_that_reaches_14_8T_tokens(v3: TrainingPlan) -> None:
    last = v3.window(v3.steps - 1)
    step_tokens = last.count * SEQUENCES * LENGTH
    assert step_tokens == 62_914_560
    assert v3.tokens - step_tokens < 14.8e12 <= v3.tokens
    # the ramp's steps in closed form: the integral of dT / B(T), then a constant batch
    ramp_steps = 469e9 / ((15360 - 3072) * LENGTH) * math.log(15360 / 3072)
    assert v3.steps == pytest.approx(ramp_steps + (14.8e12 - 469e9) / step_tokens, abs=3)


def test_A19_the_first_2000_steps_of_the_ramp_read_28B_tokens(v3: TrainingPlan) -> None:
    growth = (15360 - 3072) * LENGTH / 469e9
    expected = 3072 * LENGTH / growth * math.expm1(growth * 2000)
    assert v3.progress(1999).tokens == pytest.approx(expected, rel=2e-4)
    assert v3.progress(1999).tokens == pytest.approx(28e9, rel=5e-3)


def test_the_windows_of_a_ramp_are_contiguous_and_disjoint_and_progress_agrees(
    v3: TrainingPlan,
) -> None:
    steps = [*range(20_000), *range(v3.steps - 5, v3.steps)]
    windows = [v3.window(step) for step in steps]
    assert all(a.first + a.count == b.first for a, b in pairwise(windows[:20_000]))
    assert all(a.first + a.count == b.first for a, b in pairwise(windows[-5:]))
    assert windows[0].first == 0
    assert windows[-1].first + windows[-1].count == v3.micro_batches
    for step in (0, 1, 1999, 14_000, 100_000, v3.steps - 1):
        window, progress = v3.window(step), v3.progress(step)
        assert progress.step == step + 1
        assert progress.tokens == (window.first + window.count) * SEQUENCES * LENGTH
        assert (progress.total_steps, progress.total_tokens) == (v3.steps, v3.tokens)
    assert v3.progress(v3.steps - 1).position("fraction") == 1.0


def test_the_last_step_of_any_run_stands_at_its_end() -> None:
    decay = Schedule(start=1.0, segments=[Segment(until=1, shape="linear", to=0.0)])
    for tokens in (1, 100, 385, 1000):
        plan = TrainingPlan(sequences=8, length=16, micro_batches=3, tokens=tokens)
        assert decay.at(plan.progress(plan.steps - 1)) == 0.0


@pytest.mark.parametrize(
    ("overrides", "steps", "tokens"),
    [
        ([], 10, 10 * 4 * 64),
        (["batch.accumulate=3"], 10, 3 * 10 * 4 * 64),
        (["budget={steps: null, tokens: 1e6}"], math.ceil(1e6 / 256), math.ceil(1e6 / 256) * 256),
        (["budget={steps: null, tokens: 257}", "batch.accumulate=2"], 1, 512),
        (["batch.accumulate={start: 1, unit: steps, segments: [{until: 2, to: 2, shape: linear}]}"], 10, 256 * 18.5),
    ],
)  # fmt: skip
def test_the_plan_of_a_recipe(overrides: list[str], steps: int, tokens: float, base: Path) -> None:
    plan = plan_of(compose(base, overrides))
    assert plan.steps == steps
    if "segments" not in "".join(overrides):
        assert plan.tokens == tokens
    else:  # 1, round(1.5) = 2, then 2 each
        assert [plan.window(step).count for step in range(10)] == [1, *[2] * 9]
        assert plan.tokens == 19 * 256
