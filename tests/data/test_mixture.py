"""Mixtures: every sequence is of one part, parts have their shares, and losses of parts add up to the whole."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import MakeCorpus

from core.contracts.context import SequenceContext
from core.contracts.corpus import Corpus, MixtureCorpus, MixturePart, Split, TokenBlock, TokenCorpus
from core.contracts.errors import UserError
from core.data.held_out import HeldOut
from core.data.loaders import ValidationLoader, WindowLoader
from core.data.mixture_order import CYCLE, MixtureOrder, quotas_of
from core.data.prepare import prepare
from core.data.recorded import RecordedData, read_documents
from core.data.sequences import sequences_of
from core.data.store import TokenStore
from core.data.windows import source_ranges
from core.extension.loader import installed_registry
from core.model.by_source import losses_by_source
from core.model.loss import cross_entropy_sum
from core.recipe.plan import TrainingPlan
from core.recipe.resolve import Resolver
from plugins.mixture.corpus import Mixture

VOCAB = 300
LENGTH = 4
NAMES = ("a", "b", "c")
WEIGHTS = (0.5, 0.3, 0.2)


class Parts(MixtureCorpus):
    """A mixture of given corpora."""

    def __init__(self, **parts: tuple[Corpus, float]) -> None:
        super().__init__(None)
        self._parts = [MixturePart(name, *part) for name, part in parts.items()]

    def parts(self) -> list[MixturePart]:
        return self._parts


def store(*lengths: int) -> TokenStore:
    """A stream with a document of each length, each of a source of its own; a token is its own place."""
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenStore(
        np.arange(starts[-1], dtype=np.uint32),
        starts[:-1],
        bytes=0,
        sources=np.arange(len(lengths), dtype=np.int64),
    )


def order(*lengths: int, seed: int = 0) -> MixtureOrder:
    counts = sequences_of(store(*lengths), LENGTH, by_source=True).counts
    return MixtureOrder(NAMES, WEIGHTS, counts, LENGTH, seed)


def begins(mixed: MixtureOrder, lengths: tuple[int, ...], positions: Any) -> list[int]:
    """The first token of the sequence at each position."""
    parts, numbers = mixed.places(np.asarray(positions))
    firsts = np.array([begin for begin, _ in source_ranges(store(*lengths))])
    found: list[int] = (firsts[parts] + numbers * LENGTH).tolist()
    return found


def begins_by_loop(lengths: tuple[int, ...], count: int) -> list[int]:
    """Each part's places spread evenly over a cycle, and its epochs one after the other."""
    ranges = source_ranges(store(*lengths))
    found = []
    lines: list[list[int]] = [[] for _ in lengths]
    epochs = [0] * len(lengths)
    places = []
    for part, weight in enumerate(WEIGHTS):
        quota = round(weight * CYCLE)
        places += [(Fraction(2 * rank + 1, 2 * quota), part) for rank in range(quota)]
    cycle = [part for _, part in sorted(places)]
    for position in range(count):
        part = cycle[position % CYCLE]
        if not lines[part]:
            sequences = (lengths[part] - 1) // LENGTH
            seeds = np.random.SeedSequence(0, spawn_key=(epochs[part], part))
            words = np.random.PCG64(seeds).random_raw(sequences)
            lines[part] = np.argsort(words, kind="stable").tolist()
            epochs[part] += 1
        found.append(ranges[part][0] + LENGTH * lines[part].pop(0))
    return found


def test_each_part_is_read_epoch_after_epoch() -> None:
    lengths = (41, 13, 90)
    expected = begins_by_loop(lengths, CYCLE + 500)
    assert begins(order(*lengths), lengths, np.arange(CYCLE + 500)) == expected
    jumping = order(*lengths)
    places = [CYCLE + 3, 0, 700, CYCLE - 1]
    assert begins(jumping, lengths, places) == [expected[place] for place in places]


def test_every_stretch_has_nearly_the_shares_of_the_weights() -> None:
    mixed = order(41, 13, 90)
    counts = np.zeros(3)
    for position, part in enumerate(mixed._parts, start=1):
        counts[part] += 1
        assert np.abs(counts - position * np.array(WEIGHTS)).max() <= 1.5
    assert counts.tolist() == [5000, 3000, 2000]


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.9999, 0.0001), (1.0,)])
def test_quotas_fill_a_cycle(weights: tuple[float, ...]) -> None:
    quotas = quotas_of(weights)
    assert quotas.sum() == CYCLE
    assert np.abs(quotas - np.array(weights) * CYCLE).max() <= 1
    assert quotas.min() >= 1


def test_epochs_are_counted_for_each_part() -> None:
    mixed = order(41, 13, 90)
    read = np.bincount(mixed._parts, minlength=3)
    assert mixed.epochs(CYCLE) == [float(n) / c for n, c in zip(read, (10, 3, 22), strict=True)]
    half = np.bincount(mixed._parts[:7], minlength=3)
    assert mixed.epochs(7) == [float(n) / c for n, c in zip(half, (10, 3, 22), strict=True)]


def test_a_part_that_is_too_short_is_named() -> None:
    with pytest.raises(UserError, match="the part 'b' of the mixture is too short"):
        order(41, LENGTH, 90)


def plan(steps: int) -> TrainingPlan:
    return TrainingPlan(sequences=4, length=LENGTH, micro_batches=2, steps=steps)


def test_no_sequence_reaches_into_the_next_part() -> None:
    tokens = store(41, 13, 90)
    ranges = source_ranges(tokens)
    loader = WindowLoader(tokens, plan=plan(20), seed=0, order=order(41, 13, 90))
    for window in loader:
        for batch in window:
            assert batch.source_B is not None
            assert bool(batch.valid_BL.all())
            for row, source in enumerate(batch.source_B.tolist()):
                begin, end = ranges[source]
                assert begin <= batch.tokens_BL[row].min() <= batch.targets_BL[row].max() < end


def test_two_ranks_read_the_batches_of_one() -> None:
    tokens = store(41, 13, 90)
    alone = WindowLoader(tokens, plan=plan(5), seed=0, order=order(41, 13, 90))
    ranks = [
        WindowLoader(tokens, plan=plan(5), seed=0, order=order(41, 13, 90), rank=rank, world=2)
        for rank in range(2)
    ]
    for window, *shares in zip(alone, *ranks, strict=True):
        for index, batch in enumerate(window):
            both = torch.cat([share[index].tokens_BL for share in shares])
            assert torch.equal(batch.tokens_BL, both)


@pytest.mark.parametrize("world", [1, 2])
def test_validation_predicts_every_token_of_every_part_once(world: int) -> None:
    tokens = store(41, 2, 1, 90)
    predicted: list[tuple[int, int]] = []
    for rank in range(world):
        loader = ValidationLoader(
            tokens, length=LENGTH, sequences=4, rank=rank, world=world, by_source=True
        )
        for batch in loader:
            assert batch.source_B is not None
            for row, source in enumerate(batch.source_B.tolist()):
                for target in batch.targets_BL[row][batch.valid_BL[row]].tolist():
                    predicted.append((source, target))
    expected = []
    for source, (begin, end) in enumerate(source_ranges(tokens)):
        expected += [(source, token) for token in range(begin + 1, end)]
    assert sorted(predicted) == expected


def test_losses_by_source_add_up_to_the_loss() -> None:
    torch.manual_seed(0)
    sources = [0, 2, 0, 2, 0]
    hidden_BLD = torch.randn(5, LENGTH, 8, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(11, 8, dtype=torch.float64)
    tokens_BL = torch.randint(11, (5, LENGTH))
    targets_BL = torch.randint(11, (5, LENGTH))
    context = SequenceContext.of(
        tokens_BL,
        targets_BL=targets_BL,
        valid_BL=torch.rand(5, LENGTH) < 0.8,
        source_B=torch.tensor(sources),
        source_names=NAMES,
    )
    counted_BL = context.predicted()
    losses_T = torch.zeros(5 * LENGTH, dtype=torch.float64)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return x @ weight_VD.T

    plain = cross_entropy_sum(logits, hidden_BLD, targets_BL, counted_BL)
    total = cross_entropy_sum(logits, hidden_BLD, targets_BL, counted_BL, losses_T)
    assert torch.equal(plain, total)
    metrics = losses_by_source(context, losses_T, counted_BL)
    for number, name in enumerate(NAMES):
        expected = 0.0
        count = 0
        for row in range(5):
            for place in range(LENGTH):
                if sources[row] == number and counted_BL[row, place]:
                    chosen = logits(hidden_BLD[row, place]).log_softmax(0)
                    expected -= float(chosen[targets_BL[row, place]].detach())
                    count += 1
        metric = metrics[f"source/{name}"]
        assert int(metric.count) == count  # type: ignore[union-attr]
        assert float(metric.sum) == pytest.approx(expected, abs=1e-12)  # type: ignore[union-attr]
    assert float(sum(m.sum for m in metrics.values())) == pytest.approx(float(total.detach()))  # type: ignore[union-attr]


def mixture(make: MakeCorpus, texts: dict[str, bytes], weight: float = 3.0) -> Parts:
    other = {f"other-{index:02d}": b"zz yy xx " * 30 for index in range(12)}
    return Parts(one=(make(texts), weight), two=(make(other), 1.0))


def test_parts_are_split_one_by_one_and_lie_one_after_the_other(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    data = prepare(mixture(corpus_of, texts), VOCAB)
    assert data.sources is not None
    assert data.sources.names == ("one", "two")
    assert data.sources.weights == (0.75, 0.25)
    assert data.sources.validation_bytes == (len(texts["doc-10"]), 270)
    assert data.train.sources is not None
    assert data.train.sources.tolist() == [0] * 24 + [1] * 11
    assert data.validation.bytes == len(texts["doc-10"]) + 270
    listed = read_documents(data.documents or "")
    assert listed.keys() == {f"one/{name}" for name in texts} | {
        f"two/other-{index:02d}" for index in range(12)
    }


def test_weights_are_part_of_the_data_and_not_of_the_tokens(
    corpus_of: MakeCorpus, texts: dict[str, bytes], cache: Path
) -> None:
    one = prepare(mixture(corpus_of, texts), VOCAB)
    two = prepare(mixture(corpus_of, texts, weight=2.0), VOCAB)
    assert one.fingerprint != two.fingerprint
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 1


def test_a_document_of_a_part_that_changed_is_named(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    data = prepare(mixture(corpus_of, texts), VOCAB)
    listed = read_documents(data.documents or "")
    recorded = RecordedData(Path("run"), data.fingerprint, "0.0.1", data.tokenizer, listed)
    changed = mixture(corpus_of, texts | {"doc-03": b"other"})
    with pytest.raises(UserError, match=r"document 'one/doc-03' .* has another text"):
        prepare(changed, VOCAB, recorded)


def test_validation_of_its_own_may_be_a_mixture_of_the_same_parts(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    own = HeldOut(corpus=Parts(two=(corpus_of({"v": b"held"}), 1.0)))
    data = prepare(mixture(corpus_of, texts), VOCAB, None, own)
    assert data.sources is not None
    assert data.sources.validation_bytes == (0, 4)
    assert data.train.documents == 37
    other = HeldOut(corpus=Parts(three=(corpus_of({"v": b"held"}), 1.0)))
    with pytest.raises(UserError, match=r"data\.validation has the part 'three'"):
        prepare(mixture(corpus_of, texts), VOCAB, None, other)
    plain = prepare(mixture(corpus_of, texts), VOCAB, None, HeldOut(corpus=corpus_of({"v": b"h"})))
    assert plain.validation.sources is None


class Ids(TokenCorpus):
    """Blocks of one id."""

    def __init__(self, token: int, count: int = 3) -> None:
        super().__init__(None)
        self.token = token
        self.count = count

    @property
    def vocabulary(self) -> int | None:
        return None

    def tokenizer_json(self) -> str | None:
        return None

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        for _ in range(self.count if split == "train" else 1):
            yield TokenBlock([self.token] * 5, text_bytes=10)


def test_tokens_are_mixed_too_but_not_with_text(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    data = prepare(Parts(one=(Ids(1), 1.0), two=(Ids(2, 2), 3.0)), 10)
    assert data.sources is not None
    assert data.sources.weights == (0.25, 0.75)
    assert data.sources.validation_bytes == (10, 10)
    assert data.train.tokens.tolist() == [1] * 15 + [2] * 10
    assert source_ranges(data.train) == [(0, 15), (15, 25)]
    half = prepare(Parts(one=(Ids(1), 1.0), two=(Ids(2), 1.0)), 10, None, HeldOut(0.5))
    assert half.validation.tokens.tolist() == [1] * 10 + [2] * 10
    with pytest.raises(UserError, match="cannot be joined with one of token ids"):
        prepare(Parts(one=(Ids(1), 1.0), two=(corpus_of(texts), 1.0)), VOCAB)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("weights={}", "must give every corpus a weight, also one"),
        ("weights={one: 1, too: 1}", "unknown corpus too; did you mean two?"),
        ("weights={one: 1, two: 0}", "must be more than 0 and finite, also of two"),
        ("weights={one: 1, two: 1e-5}", "must be at least 0.0001 of their sum, also of two"),
        ("corpora={}", "must hold at least one corpus"),
        ("corpora={a/b: {name: package_text}}", "a name must be of letters, digits, _ and -"),
        (
            "corpora={one: {name: mixture, corpora: {x: {name: package_text}}, weights: {x: 1}}}",
            "no mixture",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path: Path, changes: str, sentence: str) -> None:
    key, _, value = changes.partition("=")
    raw = {
        "name": "mixture",
        "corpora": {"one": {"name": "package_text"}, "two": {"name": "package_text"}},
        "weights": {"one": 1, "two": 1},
    } | {key: yaml.safe_load(value)}
    resolver = Resolver(installed_registry(), lambda _: "r.yaml", {})
    with pytest.raises(UserError) as error:
        resolver.component("corpus", raw, "data.corpus", None)
    assert sentence in str(error.value)
    assert str(error.value).startswith(f"r.yaml: data.corpus.{key}")


def test_a_part_without_files_is_named(tmp_path: Path) -> None:
    raw = {"name": "mixture", "corpora": {"web": {"name": "files", "paths": [f"{tmp_path}/*"]}}}
    resolver = Resolver(installed_registry(), lambda _: "r.yaml", {})
    section = resolver.component("corpus", raw | {"weights": {"web": 1}}, "data.corpus", None)
    with pytest.raises(UserError, match=r"corpora\.web: the glob .* matches no file"):
        Mixture(section.config).check_source()


def test_losses_by_source_can_be_compiled_as_one_graph() -> None:
    torch.manual_seed(0)
    hidden_BLD = torch.randn(2, LENGTH, 8, requires_grad=True)
    weight_VD = torch.randn(11, 8)
    targets_BL = torch.randint(11, (2, LENGTH))

    def losses(hidden_BLD: torch.Tensor, source_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        context = SequenceContext.of(
            targets_BL, targets_BL=targets_BL, source_B=source_B, source_names=NAMES
        )
        counted_BL = context.predicted()
        losses_T = hidden_BLD.new_zeros(2 * LENGTH)
        total = cross_entropy_sum(
            lambda x: x @ weight_VD.T, hidden_BLD, targets_BL, counted_BL, losses_T
        )
        metrics = losses_by_source(context, losses_T, counted_BL)
        return total, *(metric.sum for metric in metrics.values())  # type: ignore[union-attr]

    source_B = torch.tensor([0, 2])
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    for one, two in zip(compiled(hidden_BLD, source_B), losses(hidden_BLD, source_B), strict=True):
        assert float(one.detach()) == pytest.approx(float(two.detach()), rel=1e-6)
    (gradient,) = torch.autograd.grad(compiled(hidden_BLD, source_B)[0], hidden_BLD)
    (expected,) = torch.autograd.grad(losses(hidden_BLD, source_B)[0], hidden_BLD)
    assert torch.allclose(gradient, expected)
