"""Sequences, their order, and how ranks share them; each token is its own position, so a sequence shows its place."""

import numpy as np
import pytest
import torch

from core.contracts.errors import UserError
from core.contracts.schedule import Schedule, Segment
from core.data.batch import Batch
from core.data.loaders import ValidationLoader, WindowLoader
from core.data.store import TokenStore
from core.data.windows import count_sequences, cut, epoch_order, rows_of, sequences_at
from core.recipe.plan import TrainingPlan

LENGTH = 4
RAMP = Schedule(start=1, unit="steps", segments=[Segment(until=4, shape="linear", to=3)])


def stream(tokens: int, starts: tuple[int, ...] = (0,)) -> TokenStore:
    return TokenStore(np.arange(tokens, dtype=np.uint16), np.array(starts, dtype=np.int64), bytes=1)


def plan(steps: int, micro_batches: float | Schedule = 1, sequences: int = 4) -> TrainingPlan:
    return TrainingPlan(
        sequences=sequences, length=LENGTH, micro_batches=micro_batches, steps=steps
    )


def sequences_in(window: list[Batch]) -> list[int]:
    """The numbers of the sequences in a window, read off their first tokens."""
    return [int(first) // LENGTH for batch in window for first in batch.tokens_BL[:, 0]]


def join(shares: list[Batch]) -> Batch:
    return Batch(
        *(torch.cat(parts) for parts in zip(*(share[:4] for share in shares), strict=True))
    )


def equal(one: Batch, two: Batch) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_sequence_is_its_inputs_and_the_tokens_one_further() -> None:
    batch = cut(stream(21, (0, 6, 9, 10)), np.array([4, 8]), LENGTH)
    assert batch.tokens_BL.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert batch.targets_BL.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert batch.documents_BM.tolist() == [[0, 0, 1, 1, 1], [1, 2, 3, 3, 3]]
    assert batch.valid_BL.all()
    assert [part.dtype for part in batch[:4]] == [torch.int64, torch.int64, torch.bool, torch.int64]


@pytest.mark.parametrize(("tokens", "count"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_the_incomplete_piece_at_the_end_is_left_out(tokens: int, count: int) -> None:
    assert count_sequences(tokens, LENGTH) == count


def test_a_corpus_shorter_than_one_sequence() -> None:
    with pytest.raises(UserError) as error:
        WindowLoader(stream(4), plan=plan(1), seed=0)
    assert str(error.value) == (
        "the corpus is too short: 4 training tokens, and one sequence of data.sequence_length = 4 needs 5"
    )


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    orders = {
        (seed, epoch): epoch_order(seed, epoch, 50).tolist()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    epoch_order.cache_clear()
    assert all(
        epoch_order(seed, epoch, 50).tolist() == order for (seed, epoch), order in orders.items()
    )


def test_the_order_is_pinned() -> None:
    """Compares with fixed numbers, because a resumed run must read the same order with any numpy, on any machine."""
    assert epoch_order(0, 0, 8).tolist() == [6, 3, 1, 4, 5, 2, 7, 0]
    assert epoch_order(7, 3, 8).tolist() == [2, 1, 4, 3, 5, 7, 6, 0]


def test_the_line_of_epochs_reads_each_sequence_once_an_epoch() -> None:
    line = sequences_at(np.arange(30), seed=3, count=10).reshape(3, 10)
    assert [sorted(epoch) for epoch in line.tolist()] == [list(range(10))] * 3
    assert line.tolist() == [epoch_order(3, epoch, 10).tolist() for epoch in range(3)]


def test_micro_batches_lie_end_to_end_across_epochs() -> None:
    loader = WindowLoader(stream(10 * LENGTH + 1), plan=plan(5), seed=3)
    line = sequences_at(np.arange(20), seed=3, count=10).tolist()
    assert [sequence for window in loader for sequence in sequences_in(window)] == line


def test_a_micro_batch_may_hold_several_epochs() -> None:
    loader = WindowLoader(stream(2 * LENGTH + 1), plan=plan(1, sequences=8), seed=0)
    [window] = list(loader)
    assert [sorted(sequences_in(window)[first : first + 2]) for first in (0, 2, 4, 6)] == [
        [0, 1]
    ] * 4


def test_any_micro_batch_can_be_made_without_those_before() -> None:
    tokens = stream(10 * LENGTH + 1)
    straight = [batch for window in WindowLoader(tokens, plan=plan(9), seed=1) for batch in window]
    jumping = WindowLoader(tokens, plan=plan(9), seed=1)
    assert all(equal(jumping.micro_batch(index), straight[index]) for index in (8, 0, 5))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_micro_batches_of_one(world: int) -> None:
    tokens = stream(10 * LENGTH + 3, (0, 7, 8, 21))
    alone = WindowLoader(tokens, plan=plan(6, RAMP), seed=2)
    ranks = [
        WindowLoader(tokens, plan=plan(6, RAMP), seed=2, rank=rank, world=world)
        for rank in range(world)
    ]
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert all(len(share) == len(whole) for share in shares)
        assert all(
            equal(join(list(parts)), batch) for batch, *parts in zip(whole, *shares, strict=True)
        )


def test_a_batch_ramp_reads_more_and_skips_nothing() -> None:
    ramp = plan(6, RAMP)
    loader = WindowLoader(stream(10 * LENGTH + 1), plan=ramp, seed=2)
    windows = list(loader)
    assert (
        [len(window) for window in windows]
        == [ramp.window(step).count for step in range(6)]
        == [1, 2, 2, 2, 3, 3]
    )
    line = sequences_at(np.arange(13 * 4), seed=2, count=10).tolist()
    assert [sequence for window in windows for sequence in sequences_in(window)] == line


def test_rows_that_cannot_be_shared() -> None:
    assert [list(rows_of(rank, 3, 6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError) as error:
        rows_of(0, 3, 8)
    assert str(error.value) == "a batch of 8 sequences cannot be shared equally by 3 data ranks"


def test_the_state_is_the_step_that_is_read_next() -> None:
    tokens, run = stream(10 * LENGTH + 1), plan(7, RAMP)
    first = WindowLoader(tokens, plan=run, seed=5)
    reader = iter(first)
    seen = [sequences_in(next(reader)) for _ in range(3)]
    assert first.state_dict() == {"step": 3}
    second = WindowLoader(tokens, plan=run, seed=5)
    second.load_state_dict(first.state_dict())
    rest = [sequences_in(window) for window in second]
    assert seen + rest == [
        sequences_in(window) for window in WindowLoader(tokens, plan=run, seed=5)
    ]
    assert (len(second), second.state_dict(), list(second)) == (7, {"step": 7}, [])


@pytest.mark.parametrize("tokens", [2, 5, 17, 18, 33, 40])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_predicts_every_token_once(tokens: int, world: int) -> None:
    store = stream(tokens, (0, 1))
    ranks = [
        ValidationLoader(store, length=LENGTH, sequences=4, rank=rank, world=world)
        for rank in range(world)
    ]
    assert len({len(loader) for loader in ranks}) == 1
    whole = [join(list(shares)) for shares in zip(*ranks, strict=True)]
    assert len(whole) == len(ranks[0])
    assert all(batch.tokens_BL.shape == (4, LENGTH) for batch in whole)
    everything = join(whole)
    valid = everything.valid_BL
    assert everything.targets_BL[valid].tolist() == list(range(1, tokens))
    assert everything.tokens_BL[valid].tolist() == list(range(tokens - 1))
    inputs_BL, following_BL = everything.documents_BM[:, :-1], everything.documents_BM[:, 1:]
    assert inputs_BL[valid].tolist() == ([0] + [1] * tokens)[: tokens - 1]
    assert following_BL[valid].tolist() == [1] * (tokens - 1)
    assert not everything.tokens_BL[~valid].any()
    assert not everything.targets_BL[~valid].any()
    assert (following_BL[~valid] == store.documents).all()
    assert (everything.documents_BM.diff(dim=1) >= 0).all()


def test_validation_rows_that_cannot_be_shared() -> None:
    with pytest.raises(
        UserError, match="a batch of 3 sequences cannot be shared equally by 2 data ranks"
    ):
        ValidationLoader(stream(9), length=LENGTH, sequences=3, rank=0, world=2)
