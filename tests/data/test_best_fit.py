"""Best-fit packing beside a slow reference: every document once, few are cut, and boundaries stay where they are."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCorpus
from tokenizer_files import END, write_deepseek_like

from core.data.best_fit import best_fit, split_documents
from core.data.loaders import WindowLoader
from core.data.module import TextData
from core.data.sequences import sequences_of
from core.data.store import TokenStore
from core.data.tokenizer_file import load_tokenizer_file
from core.recipe.plan import TrainingPlan

LENGTH = 16


def by_scanning(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as the paper describes it: every bin is looked at for every piece."""
    spaces: list[int] = []
    bins = [0] * len(lengths)
    for piece in sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece)):
        fitting = [
            (space, number) for number, space in enumerate(spaces) if space >= lengths[piece]
        ]
        if not fitting:
            fitting = [(capacity, len(spaces))]
            spaces.append(capacity)
        space, number = min(fitting)
        spaces[number] = space - lengths[piece]
        bins[piece] = number
    return bins


@pytest.mark.parametrize("seed", range(12))
def test_bins_are_those_of_the_slow_reference(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.choice([1, 5, 17, 100])
    lengths = [draw.randint(1, capacity) for _ in range(draw.choice([1, 7, 300]))]
    found = best_fit(np.array(lengths), capacity)
    assert found.tolist() == by_scanning(lengths, capacity)
    filled = np.bincount(found, weights=lengths)
    assert filled.max() <= capacity
    assert (filled + np.roll(filled, 1) > capacity)[1:].any() or len(filled) < 3


def store_of(sizes: list[int], *, sources: list[int] | None = None, **more: Any) -> TokenStore:
    """Documents whose tokens are their places in the stream, from 1 on, so that each shows where it is from."""
    starts = np.cumsum([0, *sizes[:-1]]).astype(np.int64)
    tokens = np.arange(1, sum(sizes) + 1, dtype=np.uint32)
    numbers = None if sources is None else np.array(sources, np.int64)
    return TokenStore(tokens, starts, bytes=1, sources=numbers, **more)


def sizes_of(seed: int, count: int = 60) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice([2, 3, 5, 8, 16, 17, 18, 33, 34, 50]) for _ in range(count)]


def plan(steps: int, sequences: int = 4) -> TrainingPlan:
    return TrainingPlan(sequences=sequences, length=LENGTH, micro_batches=1, steps=steps)


@pytest.mark.parametrize("seed", range(4))
def test_an_epoch_predicts_every_token_but_markers_once(seed: int) -> None:
    """And the end of every document at whose end there is a place, as one more marker."""
    sizes = sizes_of(seed)
    store = store_of(sizes)
    sequences = sequences_of(store, LENGTH, "best_fit")
    numbers = np.arange(int(sequences.counts[0]))
    batch = sequences.cut(np.zeros_like(numbers), numbers)
    documents = batch.documents_BM
    inside = batch.valid_BL & (documents[:, 1:] == documents[:, :-1])
    starts = set((store.starts + 1).tolist())
    expected = Counter(t for t in range(1, sum(sizes) + 1) if t not in starts)
    assert Counter(batch.targets_BL[inside].tolist()) == expected
    assert batch.learned_BM is not None
    assert bool(batch.learned_BM[:, 1:][inside].all())
    across = batch.targets_BL[batch.valid_BL & ~inside & batch.learned_BM[:, 1:]].tolist()
    assert set(across) <= starts | {0}, "beyond a document only markers are predicted"
    inputs = Counter(batch.tokens_BL[batch.valid_BL].tolist())
    assert all(inputs[start] == 1 for start in starts)


@pytest.mark.parametrize("seed", range(4))
def test_only_documents_longer_than_a_sequence_are_cut_and_as_seldom_as_can_be(seed: int) -> None:
    sizes = sizes_of(seed)
    store = store_of(sizes)
    sequences = sequences_of(store, LENGTH, "best_fit")
    numbers = np.arange(int(sequences.counts[0]))
    batch = sequences.cut(np.zeros_like(numbers), numbers)
    rows: Counter[int] = Counter()
    for row in batch.documents_BM:
        rows.update(set(row.tolist()) - {store.documents})
    for document, size in enumerate(sizes):
        assert rows[document] == max(1, -(-(size - 1) // LENGTH)), (document, size)


def test_numbers_of_documents_rise_and_each_token_has_its_own() -> None:
    store = store_of(sizes_of(5))
    sequences = sequences_of(store, LENGTH, "best_fit")
    numbers = np.arange(int(sequences.counts[0]))
    batch = sequences.cut(np.zeros_like(numbers), numbers)
    assert bool((batch.documents_BM.diff(dim=1) >= 0).all())
    tokens = batch.tokens_BL.numpy()
    expected = np.searchsorted(store.starts, tokens - 1, side="right") - 1
    held = batch.valid_BL.numpy()
    assert np.array_equal(batch.documents_BM[:, :-1].numpy()[held], expected[held])


def test_tokens_that_a_corpus_brings_get_no_marker_and_keep_their_masks() -> None:
    sizes = [5, 17, 3, 9, 40]
    learned = np.random.default_rng(0).random(sum(sizes)) < 0.5
    store = store_of(sizes, learned=learned)
    sequences = sequences_of(store, LENGTH, "best_fit")
    numbers = np.arange(int(sequences.counts[0]))
    batch = sequences.cut(np.zeros_like(numbers), numbers)
    assert 0 not in batch.targets_BL[batch.valid_BL].tolist()
    assert batch.learned_BM is not None
    held = batch.valid_BL
    targets = batch.targets_BL[held].numpy()
    documents = batch.documents_BM
    inside = (documents[:, 1:] == documents[:, :-1])[held].numpy()
    begins = np.isin(targets - 1, store.starts)
    expected = learned[targets - 1] & (inside | begins)
    assert np.array_equal(batch.learned_BM[:, 1:][held].numpy(), expected)


def test_without_a_cut_document_nothing_is_masked() -> None:
    sequences = sequences_of(store_of([5, 17, 3, 9, 4]), LENGTH, "best_fit")
    assert sequences.cut(np.zeros(1, np.int64), np.zeros(1, np.int64)).learned_BM is None


def test_no_sequence_has_documents_of_two_sources_or_of_two_sides_of_a_shift() -> None:
    sizes = sizes_of(1, 30)
    mixed = store_of(sizes, sources=[0] * 11 + [1] * 19)
    sequences = sequences_of(mixed, LENGTH, "best_fit", by_source=True)
    for part, count in enumerate(sequences.counts.tolist()):
        batch = sequences.cut(np.full(count, part), np.arange(count))
        assert batch.source_B is not None
        assert set(batch.source_B.tolist()) == {part}
        known = set(batch.documents_BM.unique().tolist()) - {30}
        assert known == set(range(11) if part == 0 else range(11, 30))
    shifted = store_of(sizes, shift=sum(sizes[:11]))
    sides = sequences_of(shifted, LENGTH, "best_fit", shifts=True)
    assert sides.counts.tolist() == sequences.counts.tolist()


def test_an_epoch_is_every_sequence_once_for_any_number_of_ranks() -> None:
    store = store_of(sizes_of(2))
    sequences = sequences_of(store, LENGTH, "best_fit")
    count = int(sequences.counts[0])
    steps = -(-count // 4)
    alone = WindowLoader(store, plan=plan(steps), seed=1, sequences=sequences)
    ranks = [
        WindowLoader(store, plan=plan(steps), seed=1, rank=rank, world=2, sequences=sequences)
        for rank in range(2)
    ]
    rows = []
    for window, *shares in zip(alone, *ranks, strict=True):
        both = torch.cat([share[0].tokens_BL for share in shares])
        assert torch.equal(window[0].tokens_BL, both)
        rows += [tuple(row.tolist()) for row in window[0].tokens_BL]
    assert len(set(rows[:count])) == count
    jumping = WindowLoader(store, plan=plan(steps), seed=1, sequences=sequences)
    jumping.load_state_dict({"step": steps - 1})
    assert torch.equal(next(iter(jumping))[0].tokens_BL, torch.tensor(rows[-4:]))


def test_split_documents_a_long_document_share_a_token() -> None:
    pieces = split_documents(np.array([0, 17, 34]), 34 + 50, LENGTH)
    assert pieces.tolist() == [[0, 17], [17, 17], [34, 17], [50, 17], [66, 17], [82, 2]]
    assert split_documents(np.array([0]), 1, LENGTH).tolist() == [[0, 1]]


def test_the_share_of_padding_is_printed(corpus_of: MakeCorpus, texts: dict[str, bytes]) -> None:
    data = TextData(
        corpus_of(texts),
        vocab=300,
        length=64,
        plan=TrainingPlan(sequences=4, length=64, micro_batches=1, steps=3),
        seed=0,
        validation_sequences=2,
        packing="best_fit",
    )
    data.prepare()
    (line,) = data.sequence_lines()
    numbers = np.arange(int(data._sequences.counts[0]))
    batch = data._sequences.cut(np.zeros_like(numbers), numbers)
    share = 1 - float(batch.valid_BL.double().mean())
    assert line.startswith(f"  packing best_fit: {len(numbers):,} sequences, {share:.2%} of their")
    assert data.epochs() == 12 / len(numbers)


def test_the_end_of_a_document_is_learned_with_the_marker_of_its_tokenizer(
    corpus_of: MakeCorpus, texts: dict[str, bytes], tmp_path: Path
) -> None:
    """A tokenizer from a file has markers with other ids than one that is trained."""
    tokenizer = load_tokenizer_file(write_deepseek_like(tmp_path / "hf"), begin=END, end=END)
    assert tokenizer.begin != 0
    data = TextData(
        corpus_of(texts),
        vocab=tokenizer.last + 1,
        length=1000,
        plan=TrainingPlan(sequences=4, length=1000, micro_batches=1, steps=1),
        seed=0,
        validation_sequences=2,
        tokenizer=lambda: tokenizer,
        packing="best_fit",
    )
    data.prepare()
    numbers = np.arange(int(data._sequences.counts[0]))
    batch = data._sequences.cut(np.zeros_like(numbers), numbers)
    across = batch.documents_BM[:, 1:] != batch.documents_BM[:, :-1]
    assert batch.learned_BM is not None, "some documents are longer than a sequence"
    found = batch.targets_BL[batch.valid_BL & across & batch.learned_BM[:, 1:]]
    assert len(found) > 1
    assert set(found.tolist()) == {tokenizer.begin}
