"""A value over a run: to which segment a knot belongs, the shapes' exact values, and DeepSeek-V3's schedules (A19)."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.contracts import schedule as schedule_module
from core.contracts.errors import ConfigError
from core.contracts.schedule import (
    Progress,
    Schedule,
    Segment,
    WarmupStableDecay,
    check_scheduled,
    value_at,
)
from core.recipe.compose import compose

MessageOf = Callable[..., str]

TOTAL = 14_800_000_000_000
WARM = 28_000_000_000
LEARNING_RATE = Schedule(
    start=0.0,
    unit="tokens",
    segments=[
        Segment(until=WARM, shape="linear", to=2.2e-4),
        Segment(until=10e12),
        Segment(until=14.3e12, shape="cosine", to=2.2e-5),
        Segment(until=14.633e12),
        Segment(until=14.8e12, to=7.3e-6),
    ],
)
GAMMA = Schedule(
    start=0.001, unit="tokens", segments=[Segment(until=14.3e12), Segment(until=14.8e12, to=0.0)]
)
WEIGHT = Schedule(
    start=0.3, unit="tokens", segments=[Segment(until=10e12), Segment(until=14.8e12, to=0.1)]
)


def at(tokens: float, total: int = TOTAL) -> Progress:
    return Progress(step=0, tokens=int(tokens), total_steps=0, total_tokens=total)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (0, 0.0),
        (WARM / 4, 0.55e-4),
        (WARM / 2, 1.1e-4),
        (WARM, 2.2e-4),
        (WARM + 1, 2.2e-4),
        (5e12, 2.2e-4),
        (10e12, 2.2e-4),
        (10e12 + 4.3e12 / 3, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.75),  # cos 60 degrees is a half
        (12.15e12, (2.2e-4 + 2.2e-5) / 2),
        (10e12 + 4.3e12 * 2 / 3, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.25),
        (14.3e12, 2.2e-5),
        (14.3e12 + 1, 2.2e-5),
        (14.633e12, 2.2e-5),
        (14.633e12 + 1, 7.3e-6),
        (14.8e12, 7.3e-6),
        (15e12, 7.3e-6),
    ],
)
def test_A19_the_learning_rate_of_DeepSeek_V3_at_every_knot_and_between(
    tokens: float, value: float
) -> None:
    assert LEARNING_RATE.at(at(tokens)) == pytest.approx(value, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0.001), (14.3e12, 0.001), (14.3e12 + 1, 0.0), (14.8e12, 0.0)]
)
def test_A19_gamma_is_0_after_14_3T_tokens(tokens: float, value: float) -> None:
    assert GAMMA.at(at(tokens)) == value


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0.3), (10e12, 0.3), (10e12 + 1, 0.1), (14.8e12, 0.1)]
)
def test_A19_lambda_is_0_1_after_10T_tokens(tokens: float, value: float) -> None:
    assert WEIGHT.at(at(tokens)) == value


def test_the_example_of_the_docstring_is_that_learning_rate() -> None:
    block = re.search(r"^    lr:\n(      .*\n)+", schedule_module.__doc__ or "", flags=re.MULTILINE)
    assert block is not None
    written = yaml.safe_load(
        re.sub(r"(\d)e(\d)", r"\1e+\2", block.group())
        .replace("10e+", "10.0e+")
        .replace("28e+", "28.0e+")
    )["lr"]
    segments = [
        Segment(**{k: v if k == "shape" else float(v) for k, v in s.items()})
        for s in written.pop("segments")
    ]
    example = Schedule(**written, segments=segments)
    for tokens in (0, WARM / 2, WARM, 5e12, 12e12, 14.3e12, 14.5e12, 14.7e12, 14.8e12):
        assert example.at(at(tokens)) == LEARNING_RATE.at(at(tokens))


def test_a_cosine_has_its_exact_midpoint_and_ends() -> None:
    cosine = Schedule(start=3.0, segments=[Segment(until=0.5, shape="cosine", to=1.0)])
    assert [cosine.at(at(tokens, 1000)) for tokens in (0, 250, 500, 501, 1000)] == [
        3.0,
        2.0,
        1.0,
        1.0,
        1.0,
    ]


def test_a_line_rises_by_equal_steps_and_the_first_step_already_moves() -> None:
    warm_up = Schedule(start=0.0, unit="steps", segments=[Segment(until=4, shape="linear", to=1.0)])
    values = [
        warm_up.at(Progress(step, 0, 10, 0)) for step in range(1, 11)
    ]  # `step` counts the step itself
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_a_knot_belongs_to_the_segment_that_ends_there() -> None:
    stairs = Schedule(
        start=1.0,
        unit="steps",
        segments=[Segment(until=2), Segment(until=4, to=5.0), Segment(until=6, to=7.0)],
    )
    assert [stairs.at(Progress(step, 0, 9, 0)) for step in range(9)] == [
        1.0,
        1.0,
        1.0,
        5.0,
        5.0,
        7.0,
        7.0,
        7.0,
        7.0,
    ]


def test_each_unit_reads_its_own_position() -> None:
    progress = Progress(step=3, tokens=600, total_steps=10, total_tokens=1000)
    assert [progress.position(unit) for unit in ("fraction", "tokens", "steps")] == [
        0.6,
        600.0,
        3.0,
    ]
    for unit, until in (("fraction", 1), ("tokens", 1000), ("steps", 5)):
        line = Schedule(
            start=0.0, unit=unit, segments=[Segment(until=until, shape="linear", to=1.0)]
        )  # type: ignore[arg-type]
        assert line.at(progress) == 0.6
    assert Progress(0, 0, 0, 0).position("fraction") == 0.0, "a run without tokens is at its start"


def test_without_segments_the_value_is_the_start_and_a_number_is_itself() -> None:
    assert Schedule(start=2.0).at(at(5)) == 2.0
    assert value_at(2, at(5)) == 2.0
    assert type(value_at(2, at(5))) is float
    assert value_at(LEARNING_RATE, at(WARM)) == 2.2e-4


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_a_moving_segment_stays_between_its_ends_and_never_turns(shape: Any) -> None:
    falling = Schedule(start=1.0, segments=[Segment(until=1, shape=shape, to=0.1)])
    values = [falling.at(at(tokens, 997)) for tokens in range(998)]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (1.0, 0.1)


BAD = {
    "falling knots": (
        [Segment(until=0.5), Segment(until=0.3)],
        "segments.1.until = 0.3: must be more than 0.5, where the segment begins",
    ),
    "equal knots": (
        [Segment(until=0.5), Segment(until=0.5)],
        "segments.1.until = 0.5: must be more than 0.5, where the segment begins",
    ),
    "knot at 0": (
        [Segment(until=0)],
        "segments.0.until = 0: must be more than 0, where the segment begins",
    ),
    "line to nowhere": (
        [Segment(until=1, shape="linear")],
        "segments.0.to = null: must be given if the shape is linear",
    ),
    "cosine to nowhere": (
        [Segment(until=0.1), Segment(until=1, shape="cosine")],
        "segments.1.to = null: must be given if the shape is cosine",
    ),
    "past the end": (
        [Segment(until=0.5), Segment(until=1.5)],
        "segments.1.until = 1.5: must be at most 1, the end of the run (unit: fraction)",
    ),
    "endless": (
        [Segment(until=math.inf)],
        "segments.0.until = inf: must be finite",
    ),
    "negative target": ([Segment(until=1, to=-1)], "segments.0.to = -1: must be at least 0"),
}


@pytest.mark.parametrize(("segments", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_schedule_is_refused_with_its_path(
    segments: list[Segment], sentence: str, base: Path, message_of: MessageOf
) -> None:
    key, _, why = sentence.partition(": ")
    with pytest.raises(ConfigError) as wrong:
        check_scheduled(Schedule(start=0.0, segments=segments), "lr", low=0)
    assert (wrong.value.key, wrong.value.why) == (f"lr.{key.partition(' ')[0]}", why)
    text = yaml.safe_dump(
        {"start": 0, "segments": [vars(s) for s in segments]}, default_flow_style=True
    ).replace("\n", " ")
    assert message_of(base, f"optimizer.lr={text}").endswith(f": optimizer.lr.{sentence}")


def test_every_value_of_a_schedule_is_held_against_the_range() -> None:
    good = Schedule(start=0.5, segments=[Segment(until=1, shape="linear", to=1.0)])
    check_scheduled(good, "weight", low=0, high=1)
    check_scheduled(0.5, "weight", low=0, high=1)
    for setting, key in (
        (good, "weight.segments.0.to"),
        (Schedule(start=0.95), "weight.start"),
        (0.95, "weight"),
    ):
        with pytest.raises(ConfigError) as wrong:
            check_scheduled(setting, "weight", low=0, high=0.9)
        assert (wrong.value.key, wrong.value.why) == (key, "must be between 0 and 0.9")
    with pytest.raises(ConfigError, match="weight: must be at least 0"):
        check_scheduled(math.nan, "weight", low=0)


def test_tokens_and_steps_may_lie_past_the_run(base: Path) -> None:
    recipe = compose(
        base,
        ["optimizer.lr={start: 1, unit: steps, segments: [{until: 1e9, shape: linear, to: 0}]}"],
    )
    assert recipe.optimizer.config.lr.segments[0].until == 1e9


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""What is left of the way from the peak to the final value after a fraction x of the decay."""


def closed_form(step: float, total: float, warmup: float, decay: float, shape: str) -> float:
    """Warm-up, stable, decay as arXiv 2405.18392 writes it, of peak 2 and final value 0.5."""
    if step <= warmup:
        return 2.0 * step / warmup
    if step <= total - decay:
        return 2.0
    return 0.5 + 1.5 * SHAPES[shape]((step - (total - decay)) / decay)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit", ["steps", "tokens", "fraction"])
def test_wsd_is_its_closed_form_at_every_step(unit: str, shape: str) -> None:
    steps, tokens = 50, 64
    scale = {"steps": 1.0, "tokens": float(tokens), "fraction": 1 / steps}[unit]
    written: Any = WarmupStableDecay(
        peak=2.0, warmup=8 * scale, decay=20 * scale, shape=shape, final=0.5
    )
    schedule = Schedule(unit=unit, wsd=written)  # type: ignore[arg-type]
    schedule.check()
    for step in range(steps + 1):
        progress = Progress(step, step * tokens, steps, steps * tokens)
        expected = closed_form(step, steps, 8, 20, shape)
        assert schedule.at(progress) == pytest.approx(expected, rel=1e-12, abs=1e-12), step
    assert schedule.at(Progress(steps, steps * tokens, steps, steps * tokens)) == 0.5


def test_wsd_is_the_same_as_its_segments() -> None:
    short = Schedule(wsd=WarmupStableDecay(peak=3.0, warmup=0.1, decay=0.25, final=0.2))
    long = Schedule(
        start=0.0,
        segments=[
            Segment(until=0.1, shape="linear", to=3.0),
            Segment(until=0.75),
            Segment(until=1, shape="1-sqrt", to=0.2),
        ],
    )
    assert [short.at(at(t, 997)) for t in range(998)] == [long.at(at(t, 997)) for t in range(998)]


def test_without_a_warm_up_wsd_begins_at_its_peak_and_a_short_run_decays_after_the_warm_up() -> (
    None
):
    stable = Schedule(unit="steps", wsd=WarmupStableDecay(peak=1.0, decay=4, shape="linear"))
    assert [stable.at(Progress(step, 0, 8, 0)) for step in range(9)] == [1.0] * 5 + [
        0.75,
        0.5,
        0.25,
        0.0,
    ]
    short = Schedule(
        unit="steps", wsd=WarmupStableDecay(peak=1.0, warmup=2, decay=9, shape="linear")
    )
    assert [short.at(Progress(step, 0, 4, 0)) for step in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]


BAD_WSD = {
    "{wsd: {peak: 1, decay: 0}}": "wsd.decay = 0: must be more than 0",
    "{wsd: {peak: 1, decay: -1}}": "wsd.decay = -1: must be at least 0 and finite",
    "{wsd: {peak: 1, warmup: -1, decay: 1}}": "wsd.warmup = -1: must be at least 0 and finite",
    "{wsd: {peak: 1, warmup: 0.5, decay: 0.6}}": "wsd.decay = 0.6: must be at most 0.5, what the warm-up leaves of "
    "the run",
    "{wsd: {peak: 1, warmup: 2, decay: 1}}": "wsd.warmup = 2: must be less than 1",
    "{wsd: {peak: -1, decay: 1}}": "wsd.peak = -1: must be at least 0",
    "{wsd: {peak: .nan, decay: 1}}": "wsd.peak = nan: must be finite",
    "{wsd: {peak: 1, decay: 1}, start: 0}": "start = 0: must not be given beside wsd, which says it all",
    "{wsd: {peak: 1, decay: 1, shape: sqrt}}": "wsd.shape = 'sqrt': must be one of linear, cosine, 1-sqrt",
    "{wsd: {decay: 1}}": "wsd.peak: required key is missing",
}


@pytest.mark.parametrize(("text", "sentence"), BAD_WSD.items())
def test_a_bad_wsd_is_refused_with_its_path(
    text: str, sentence: str, base: Path, message_of: MessageOf
) -> None:
    assert message_of(base, f"optimizer.lr={text}").endswith(f": optimizer.lr.{sentence}")


def test_a_batch_ramp_is_no_wsd(base: Path, message_of: MessageOf) -> None:
    message = message_of(base, "batch.accumulate={wsd: {peak: 4, decay: 0.5}}")
    assert message.endswith("batch.accumulate.wsd: a batch ramp has start and segments instead")
