"""Plans beside the action lists of torch's own pipelining, which need no processes to be computed."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from core.cluster.plan import Plan
from core.cluster.schedules import make_plan

Row = list[tuple[tuple[str, int, int], ...]]
"""Slots as (kind, stage, micro-batch)."""


def ours(plan: Plan, rank: int) -> Row:
    """A rank's slots of a plan with one route."""
    return [
        tuple((str(a.kind), a.position, a.micro_batch) for a in slot) for slot in plan.ranks[rank]
    ]


def theirs(actions: list[Any]) -> Row:
    """torch's actions without its empty places."""
    rows: Row = []
    for action in actions:
        if action is not None:
            parts = action.sub_actions or (action,)
            rows.append(
                tuple((a.computation_type.value, a.stage_index, a.microbatch_index) for a in parts)
            )
    return rows


def without_init(name: str, ranks: int, count: int, chunks: int) -> Any:
    """A schedule of torch with the numbers that its order is computed from, and without stages."""
    kind = getattr(schedules, name)
    schedule = kind.__new__(kind)
    schedule.pp_group_size = ranks
    schedule._n_microbatches = count
    schedule.n_local_stages = chunks
    schedule.number_of_rounds = max(1, count // ranks)
    schedule.microbatches_per_round = count // schedule.number_of_rounds
    schedule._num_stages = ranks * chunks
    return schedule


@pytest.mark.parametrize("ranks", range(2, 9))
def test_1f1b_is_torchs(ranks: int) -> None:
    for count in (ranks, ranks + 3, 4 * ranks):
        schedule = schedules.Schedule1F1B.__new__(schedules.Schedule1F1B)
        schedule._num_stages = ranks
        schedule._n_microbatches = count
        schedule._stage = SimpleNamespace(stage_index=0)
        order = schedule._get_pipeline_order()
        assert order is not None
        plan = make_plan("1f1b", ranks, count)
        for rank in range(ranks - 1):
            own = [row for row in theirs(order[rank]) if row[0][0] != "REDUCE_GRAD"]
            assert own == ours(plan, rank)
        # torch's list numbers the forwards of the last rank from 1, which its own runs do not
        kinds = [row[0][0] for row in theirs(order[ranks - 1]) if row[0][0] != "REDUCE_GRAD"]
        assert kinds == [row[0][0] for row in ours(plan, ranks - 1)] == ["F", "B"] * count


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaved_1f1b_is_torchs(ranks: int, chunks: int) -> None:
    for count in (2, ranks, 3 * ranks, 2 * (ranks + 1)):
        if count % max(1, count // ranks):
            continue
        schedule = without_init("ScheduleInterleaved1F1B", ranks, count, chunks)
        plan = make_plan("interleaved_1f1b", ranks, count, chunks)
        for rank in range(ranks):
            assert theirs(schedule._calculate_single_rank_operations(rank)) == ours(plan, rank)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_dualpipev_is_torchs(ranks: int) -> None:
    for count in (2 * ranks, 2 * ranks + 1, 5 * ranks):
        schedule = without_init("ScheduleDualPipeV", ranks, count, 2)
        plan = make_plan("dualpipev", ranks, count)
        for rank in range(ranks):
            assert theirs(schedule._calculate_single_rank_operations(rank)) == ours(plan, rank)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_zb1p_defers_as_many_weights_as_torchs_zero_bubble(ranks: int) -> None:
    """torch's interleaved zero bubble with one chunk has another warm-up; the weights wait as long."""
    count = 4 * ranks
    schedule = without_init("ScheduleInterleavedZeroBubble", ranks, count, 1)
    plan = make_plan("zb1p", ranks, count)
    for rank in range(ranks):
        rows = theirs(schedule._calculate_single_rank_operations(rank))
        waiting = peak = 0
        for row in rows:
            waiting += (row[0][0] == "I") - (row[0][0] == "W")
            peak = max(peak, waiting)
        assert peak == plan.peak_weight_parts(rank)
