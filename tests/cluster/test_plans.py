"""Schedules as plans: counts, memory and bubbles are those of the papers, over ranks and micro-batches."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
from tiers import first_by_default

from core.cluster.plan import Action, ActionKind, Plan, PlanError
from core.cluster.schedules import SCHEDULES, make_plan
from core.cluster.simulate import needs, simulate, uniform
from core.contracts.errors import UserError

RANKS = range(2, 9)
DURATIONS = [(1.0, 2.0, 1.0), (1.0, 2.2, 0.9), (3.0, 5.0, 2.5)]
"""Of a forward, a whole backward, and its part for the weights."""


def cases() -> list[tuple[str, int, int, int]]:
    """Schedules with ranks, micro-batches and chunks on which they can run."""
    found = []
    for ranks in RANKS:
        for count in (1, ranks - 1, ranks, 2 * ranks + 1, 5 * ranks):
            found += [("1f1b", ranks, count, 1), ("zb1p", ranks, count, 1)]
        for count in (ranks, 2 * ranks, 4 * ranks):
            found += [("interleaved_1f1b", ranks, count, chunks) for chunks in (1, 2, 3)]
        found.append(("interleaved_1f1b", ranks, 2 * (ranks + 1), 2))
        for count in (2 * ranks, 2 * ranks + 2, 5 * ranks + ranks % 2):
            found.append(("dualpipev", ranks, count, 1))
            if ranks % 2 == 0:
                found.append(("dualpipe", ranks, count, 1))
    # 2 (ranks + 1) micro-batches are two rounds only from three ranks on
    return [case for case in found if case[0] != "interleaved_1f1b" or whole_rounds(*case[1:])]


def whole_rounds(ranks: int, count: int, chunks: int) -> bool:
    """Whether the micro-batches fill the rounds of interleaved 1F1B."""
    return chunks == 1 or count % max(1, count // ranks) == 0


def by_tier() -> list[Any]:
    """The cases, of which those on 5 to 7 ranks are in the full tier."""
    full = (pytest.mark.full,)
    return [
        pytest.param(case, marks=full if 4 < case[1] < 8 else (), id=str(case)) for case in cases()
    ]


@pytest.mark.parametrize("case", by_tier())
def test_every_stage_computes_every_micro_batch_once_and_the_plan_ends(
    case: tuple[str, int, int, int],
) -> None:
    name, ranks, count, _ = case
    plan = make_plan(*case)
    plan.check()
    for rank in range(ranks):
        stages = len(plan.chunks(rank))
        each = count // 2 if name == "dualpipe" else count
        assert plan.count(rank, ActionKind.FORWARD) == stages * each
        split = plan.count(rank, ActionKind.INPUT)
        assert split + plan.count(rank, ActionKind.BACKWARD) == stages * each
        assert split == plan.count(rank, ActionKind.WEIGHT)
    timeline = simulate(plan, uniform(1.0, 2.0, 1.0), transfer=0.1)
    ends = {a: t.end for slots in timeline.ranks for t in slots for a in t.slot}
    for slots in timeline.ranks:
        for timed in slots:
            for action in timed.slot:
                for needed in needs(plan, action):
                    before = ends.get(needed, ends.get(needed.other(ActionKind.BACKWARD), 1e9))
                    assert before <= timed.start
        assert all(a.end <= b.start for a, b in pairwise(slots))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("forward", "backward", "weight"), DURATIONS)
def test_bubbles_of_1f1b_and_zb1p_are_the_papers(
    ranks: int, forward: float, backward: float, weight: float
) -> None:
    duration = uniform(forward, backward, weight)
    for count in (ranks, 2 * ranks + 1, 4 * ranks):
        whole = (ranks - 1) * (forward + backward)
        timeline = simulate(make_plan("1f1b", ranks, count), duration)
        assert [timeline.bubble(r) for r in range(ranks)] == pytest.approx([whole] * ranks)
        split = (ranks - 1) * (forward + backward - 2 * weight)
        timeline = simulate(make_plan("zb1p", ranks, count), duration)
        assert [timeline.bubble(r) for r in range(ranks)] == pytest.approx([split] * ranks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_interleaving_divides_the_bubble_by_the_chunks(ranks: int, chunks: int) -> None:
    # a rank's forward of 1 and backward of 2 are spread over its chunks
    duration = uniform(1.0 / chunks, 2.0 / chunks)
    for count in (ranks, 3 * ranks):
        timeline = simulate(make_plan("interleaved_1f1b", ranks, count, chunks), duration)
        bubble = (ranks - 1) * 3.0 / chunks
        assert [timeline.bubble(r) for r in range(ranks)] == pytest.approx([bubble] * ranks)


@pytest.mark.parametrize("stages", first_by_default([4, 8, 6, 12, 16], keep=2))
@pytest.mark.parametrize("pair", [2.0, 2.2, 2.6, 3.0])
def test_dualpipes_bubble_is_the_reports_where_the_parts_are_equal(
    stages: int, pair: float
) -> None:
    """(PP / 2 - 1) (F&B + B - 3 W); DualPipeV has the same with half of the ranks.

    The report's formula is that of the ranks in the middle; an overlapped pair shorter than F + B leaves less to the
    outer ones, whose time was longer.
    """
    formula = (stages / 2 - 1) * (pair + 2.0 - 3.0)
    for name, ranks in (("dualpipe", stages), ("dualpipev", stages // 2)):
        for count in (2 * stages, 2 * stages + 2, 4 * stages):
            timeline = simulate(make_plan(name, ranks, count), uniform(1.0, 2.0, 1.0, pair))
            bubbles = [timeline.bubble(rank) for rank in range(ranks)]
            assert max(bubbles) == pytest.approx(formula)


def test_dualpipes_formula_is_an_upper_bound_where_weights_take_less() -> None:
    for stages in (4, 8, 16):
        timeline = simulate(make_plan("dualpipe", stages, 4 * stages), uniform(1, 2, 0.8, 2.6))
        formula = (stages / 2 - 1) * (2.6 + 2 - 3 * 0.8)
        assert 0 < max(timeline.bubble(r) for r in range(stages)) <= formula


@pytest.mark.parametrize("ranks", RANKS)
def test_peaks_in_flight_are_those_of_the_table(ranks: int) -> None:
    for name in ("1f1b", "zb1p"):
        plan = make_plan(name, ranks, 4 * ranks)
        assert [plan.peak_in_flight(r) for r in range(ranks)] == list(range(ranks, 0, -1))
    assert [plan.peak_weight_parts(r) for r in range(ranks)] == [r + 1 for r in range(ranks)]
    plan = make_plan("dualpipev", ranks, 4 * ranks)
    assert [plan.peak_in_flight(r) for r in range(ranks)] == [2 * ranks + 1] * ranks
    if ranks % 2 == 0:
        plan = make_plan("dualpipe", ranks, 4 * ranks)
        assert [plan.peak_in_flight(r) for r in range(ranks)] == [ranks + 1] * ranks
        assert [plan.peak_by_chunk(r) for r in range(ranks)] == [
            [ranks - r, r + 1] for r in range(ranks)
        ]
    for chunks in (2, 3):
        plan = make_plan("interleaved_1f1b", ranks, 8 * ranks, chunks)
        expected = [(chunks - 1) * ranks + 2 * (ranks - 1 - r) + 1 for r in range(ranks)]
        assert [plan.peak_in_flight(r) for r in range(ranks)] == expected


@pytest.mark.parametrize("ranks", RANKS)
def test_no_schedule_keeps_the_weight_parts_waiting_at_the_end(ranks: int) -> None:
    for name in SCHEDULES:
        if name == "dualpipe" and ranks % 2:
            continue
        plan = make_plan(name, ranks, 2 * ranks)
        for rank in range(ranks):
            split = plan.count(rank, ActionKind.INPUT)
            assert plan.count(rank, ActionKind.WEIGHT) == split
            if split:
                assert plan.ranks[rank][-1][0].kind is ActionKind.WEIGHT


def test_a_plan_that_waits_for_itself_is_a_deadlock_that_is_named() -> None:
    plan = make_plan("1f1b", 2, 2)
    wrong = (plan.ranks[0][::-1], plan.ranks[1])
    with pytest.raises(PlanError, match=r"deadlock: rank 0 waits with B1 .* for F1 "):
        simulate(dataclasses.replace(plan, ranks=wrong), uniform(1, 2))


def test_a_plan_with_a_gap_a_double_or_a_foreign_stage_is_refused() -> None:
    plan = make_plan("zb1p", 2, 3)
    first = plan.ranks[0]
    for broken, message in (
        (first[:-1], "is computed as F 1, B 0, I 1, W 0"),
        ((*first, first[0]), "is computed as F 2"),
        ((*first, plan.ranks[1][0]), "rank 0 does not hold"),
        ((*first, (Action(ActionKind.FORWARD, 0, 9),)), "is of no micro-batch"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan(plan.name, plan.routes, plan.micro_batches, (broken, plan.ranks[1])).check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 2, 2), "schedule = 'gpipe' must be one of 1f1b, "),
        (("1f1b", 0, 2), "ranks = 0 must be a whole number of at least 1"),
        (("dualpipe", 3, 12), "ranks = 3 must be even"),
        (("dualpipe", 4, 9), "micro_batches = 9 must be even"),
        (("dualpipe", 4, 6), "micro_batches = 6 must be at least 8"),
        (("dualpipev", 4, 6), "micro_batches = 6 must be at least 8"),
        (("interleaved_1f1b", 4, 9, 2), "micro_batches = 9 must be a multiple of 2"),
    ],
)
def test_what_a_schedule_cannot_do_is_one_sentence(
    arguments: tuple[str, int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(*arguments)


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_dualpipe_has_as_many_pairs_and_split_weights_as_deepseeks(ranks: int) -> None:
    """The numbers of the eight parts of `dualpipe.py`, for a rank at distance `near` from the end of its half."""
    half = ranks // 2
    for count in (2 * ranks, 2 * ranks + 2, 6 * ranks):
        plan = make_plan("dualpipe", ranks, count)
        for rank in range(ranks):
            near = min(rank, ranks - 1 - rank)
            inner = half - near - 1
            pairs = 2 * (count // 2 - ranks + near + 1) + inner - (inner == 0)
            assert sum(len(slot) == 2 for slot in plan.ranks[rank]) == pairs
            assert plan.count(rank, ActionKind.WEIGHT) == inner + inner + near + 1
            assert plan.count(rank, ActionKind.INPUT) == inner + inner + near + 1
            fronts = [slot[0] for slot in plan.ranks[rank][: 2 * inner]]
            assert all(action.kind is ActionKind.FORWARD for action in fronts)
