"""Fill-in-the-middle: documents rearranged where they are read, beside lists that are rearranged by hand."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeCorpus

from core.contracts.corpus import Corpus
from core.contracts.errors import UserError
from core.data.fim import FillInTheMiddle, draw_cuts, rearrange
from core.data.loaders import WindowLoader
from core.data.module import TextData
from core.data.prepare import prepare
from core.data.sequences import sequences_of
from core.data.store import TokenStore
from core.data.tokenizer import END
from core.recipe.plan import TrainingPlan

VOCAB = 300
PRE, HOLE, FIM_END = IDS = (297, 298, 299)
MARKERS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
HALF = FillInTheMiddle(0.5, MARKERS)


def store_of(sizes: list[int], seed: int = 0, **more: object) -> tuple[TokenStore, list[list[int]]]:
    """Documents of drawn tokens, and the stream that they are; a marker is before each."""
    draw = random.Random(seed)
    documents = [[draw.randint(1, 296) for _ in range(size)] for size in sizes]
    tokens = np.array([t for ids in documents for t in (END, *ids)], np.uint16)
    starts = np.cumsum([0, *(size + 1 for size in sizes[:-1])]).astype(np.int64)
    return TokenStore(tokens, starts, bytes=1, **more), documents  # type: ignore[arg-type]


def by_hand(documents: list[list[int]], rate: float, seed: int) -> list[list[int]]:
    """The documents, markers before them, with the drawn cuts applied to lists."""
    cuts = draw_cuts(np.array([len(ids) for ids in documents]), rate, seed)
    found = []
    for number, ids in enumerate(documents):
        if cuts.chosen[number]:
            one, two = int(cuts.first[number]), int(cuts.second[number])
            ids = [PRE, *ids[:one], HOLE, *ids[two:], FIM_END, *ids[one:two]]
        found.append([END, *ids])
    return found


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_the_stream_is_that_of_documents_rearranged_by_hand(rate: float) -> None:
    store, documents = store_of([1, 2, 3, 7, 1, 30, 4, 1, 12, 5, 2, 2, 90, 1])
    fim = FillInTheMiddle(rate, MARKERS)
    for seed in range(20):
        found = rearrange(store, fim, IDS, seed)
        expected = by_hand(documents, rate, seed)
        flat = [token for ids in expected for token in ids]
        assert found.tokens[:].tolist() == flat
        assert len(found) == len(flat)
        assert found.starts.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
        places = np.random.default_rng(seed).integers(len(flat), size=(5, 9))
        assert np.array_equal(found.tokens[places], np.array(flat)[places])
        assert found.tokens[3:17].tolist() == flat[3:17]


def test_the_share_and_the_cuts_are_even() -> None:
    """A tenth of 40,000 documents within four deviations; of 3 tokens every pair of cuts as often as it should be."""
    cuts = draw_cuts(np.full(40_000, 3), 0.1, 7)
    assert abs(cuts.chosen.sum() - 4000) < 4 * np.sqrt(3600)
    pairs = cuts.first * 4 + cuts.second
    assert bool((cuts.first <= cuts.second).all())
    for first in range(4):
        for second in range(first, 4):
            expected = 40_000 * (1 if first == second else 2) / 16
            assert abs((pairs == first * 4 + second).sum() - expected) < 4 * np.sqrt(expected)


def test_a_document_is_cut_as_the_seed_and_its_place_say_whatever_comes_after_it() -> None:
    few, many = draw_cuts(np.full(10, 9), 0.5, 3), draw_cuts(np.full(50, 9), 0.5, 3)
    assert np.array_equal(few.chosen, many.chosen[:10])
    assert np.array_equal(few.first, many.first[:10])
    other = draw_cuts(np.full(50, 9), 0.5, 4)
    assert not np.array_equal(other.chosen, many.chosen)


def test_a_shift_moves_with_the_documents_before_it() -> None:
    store, documents = store_of([5] * 20)
    shifted = TokenStore(store.tokens, store.starts, 1, shift=int(store.starts[8]))
    found = rearrange(shifted, HALF, IDS, 1)
    assert found.shift == sum(map(len, by_hand(documents, 0.5, 1)[:8]))
    assert found.shift == found.starts[8]


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_ranks_and_micro_batches_read_the_same_documents(packing: str) -> None:
    store, _ = store_of([9, 40, 3, 17, 25, 8, 60, 2] * 4)
    found = rearrange(store, HALF, IDS, 2)
    sequences = sequences_of(found, 16, packing)  # type: ignore[arg-type]

    def plan(accumulate: int) -> TrainingPlan:
        per_micro = 8 // accumulate
        return TrainingPlan(sequences=per_micro, length=16, micro_batches=accumulate, steps=5)

    alone = WindowLoader(found, plan=plan(1), seed=2, sequences=sequences)
    apart = WindowLoader(found, plan=plan(4), seed=2, sequences=sequences)
    ranks = [
        WindowLoader(found, plan=plan(1), seed=2, rank=rank, world=2, sequences=sequences)
        for rank in range(2)
    ]
    for one, four, *shares in zip(alone, apart, *ranks, strict=True):
        assert torch.equal(one[0].tokens_BL, torch.cat([batch.tokens_BL for batch in four]))
        assert torch.equal(one[0].tokens_BL, torch.cat([share[0].tokens_BL for share in shares]))


def test_best_fit_packs_the_rearranged_documents() -> None:
    store, documents = store_of([4, 9, 2, 11, 7, 3, 6])
    sequences = sequences_of(rearrange(store, HALF, IDS, 1), 16, "best_fit")
    batch = sequences.cut(
        np.zeros(int(sequences.counts[0]), np.int64), np.arange(int(sequences.counts[0]))
    )
    tokens_BM = torch.cat([batch.tokens_BL, batch.targets_BL[:, -1:]], dim=1)
    found = {}
    for row, numbers in zip(tokens_BM, batch.documents_BM, strict=True):
        for document in set(numbers.tolist()) - {len(documents)}:
            found[document] = row[numbers == document].tolist()
    assert [found[d] for d in range(len(documents))] == by_hand(documents, 0.5, 1)


def data_of(corpus: Corpus, fim: FillInTheMiddle | None = HALF, seed: int = 0) -> TextData:
    run = TrainingPlan(sequences=4, length=32, micro_batches=1, steps=4)
    return TextData(
        corpus, vocab=VOCAB, length=32, plan=run, seed=seed, validation_sequences=2, fim=fim
    )


def test_the_markers_are_the_last_entries_and_never_made_from_text(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    """Merges are those of a tokenizer with three entries less, so the text's ids are too."""
    data = data_of(corpus_of(texts))
    tokenizer = data.tokenizer
    assert tokenizer is not None
    assert tokenizer.size == VOCAB
    assert HALF.ids(tokenizer) == IDS
    spelt = f"a {MARKERS[0]} b"
    assert not set(tokenizer.encode(spelt)) & set(IDS)
    assert tokenizer.decode(tokenizer.encode(spelt)) == spelt
    plain = prepare(corpus_of(texts), VOCAB - 3)
    assert plain.tokenizer is not None
    assert plain.tokenizer.encode(spelt) == tokenizer.encode(spelt)
    stored = prepare(corpus_of(texts), VOCAB, fim=HALF)
    assert np.array_equal(stored.train.tokens, plain.train.tokens)


def test_only_training_documents_are_rearranged_and_their_text_is_the_same(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    data = data_of(corpus_of(texts))
    data.prepare()
    validation = data._prepared.validation
    assert not set(np.asarray(validation.tokens).tolist()) & set(IDS)
    assert data.validation_bytes == len(texts["doc-10"])
    tokens = data._prepared.train.tokens[:].tolist()
    names = [name for name in sorted(texts) if name != "doc-10"]
    documents = np.split(tokens, data._prepared.train.starts[1:])
    changed = 0
    assert data.tokenizer is not None
    for name, ids in zip(names, documents, strict=True):
        body = ids[1:].tolist()
        if body[0] == PRE:
            hole, end = body.index(HOLE), body.index(FIM_END)
            body = body[1:hole] + body[end + 1 :] + body[hole + 1 : end]
            changed += 1
        assert data.tokenizer.decode(body).encode() == texts[name]
    assert data.sequence_lines() == [f"  fim: {changed} of 24 documents are rearranged"]
    assert 4 <= changed <= 20
    assert data.train_tokens == len(tokens)
    assert int(data.token_counts()[PRE]) == changed


def test_another_seed_rearranges_other_documents_of_the_same_store(
    corpus_of: MakeCorpus, texts: dict[str, bytes], cache: Path
) -> None:
    one, two = data_of(corpus_of(texts)), data_of(corpus_of(texts), seed=1)
    assert one.fingerprint == two.fingerprint
    assert one._prepared.train.tokens[:].tolist() != two._prepared.train.tokens[:].tolist()
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 1


def test_without_fim_data_are_what_they_were(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    """The names of stores and the fingerprints of runs do not change, and differ from those with markers."""
    plain = data_of(corpus_of(texts), None)
    assert plain.fingerprint == prepare(corpus_of(texts), VOCAB).fingerprint
    assert plain.fingerprint != data_of(corpus_of(texts)).fingerprint
    assert isinstance(plain._prepared.train.tokens, np.ndarray)


def test_what_cannot_be_rearranged_is_refused(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    with pytest.raises(UserError, match="vocab = 259 is too small: it must be at least 260"):
        prepare(corpus_of(texts), 259, fim=HALF)
    taken = FillInTheMiddle(0.5, ("<|endoftext|>", "b", "c"))
    with pytest.raises(UserError, match=r"data\.fim\.tokens: '<\|endoftext\|>' is an entry"):
        prepare(corpus_of(texts), VOCAB, fim=taken)
    with pytest.raises(UserError, match="no special token"):
        HALF.ids(prepare(corpus_of(texts), VOCAB).tokenizer)
    with pytest.raises(UserError, match=r"data\.fim: must be null for a corpus of token ids"):
        HALF.ids(None)
