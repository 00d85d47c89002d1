"""Data that shift in the middle of a run: what each step reads, and what identifies it."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from lab import Lab, assert_same_run

from core.assemble import make
from core.checkpoints.listing import checkpoints_in
from core.contracts.corpus import Corpus, Document
from core.contracts.errors import UserError
from core.contracts.schedule import Schedule, Segment
from core.data.batch import Batch
from core.data.documents import read_split
from core.data.loaders import WindowLoader
from core.data.module import TextData
from core.data.parts import step_of_shift
from core.data.prepare import prepare
from core.data.recorded import identity
from core.data.store import TokenStore
from core.recipe.plan import TrainingPlan

LENGTH = 4
BOUNDARY = 42  # not at the end of a sequence
RAMP = Schedule(start=1, unit="steps", segments=[Segment(until=4, shape="linear", to=3)])


class Shifting(Corpus):
    """Documents in memory, of which those in `after` are read after the shift."""

    def __init__(self, before: Mapping[str, bytes], after: Mapping[str, bytes], at: float) -> None:
        super().__init__(None)
        self.texts = (before, after)
        self.at = at

    def shift_at(self) -> float:
        return self.at

    def documents(self) -> Iterator[Document]:
        for part, texts in reversed(list(enumerate(self.texts))):
            for name, data in texts.items():
                yield Document(name=name, data=data, source=name, part=part)


def store(shift: int | None = BOUNDARY) -> TokenStore:
    """A stream in which each token is its own position."""
    tokens = np.arange(120, dtype=np.uint16)
    return TokenStore(tokens, np.zeros(1, dtype=np.int64), bytes=1, shift=shift)


def plan(steps: int = 12, micro_batches: float | Schedule = 1) -> TrainingPlan:
    return TrainingPlan(sequences=4, length=LENGTH, micro_batches=micro_batches, steps=steps)


def begins(window: list[Batch]) -> list[int]:
    """The first token of each sequence in a window."""
    return [int(first) for batch in window for first in batch.tokens_BL[:, 0]]


@pytest.mark.parametrize("micro_batches", [1, 2, RAMP])
def test_steps_before_the_shift_read_part_0_and_the_others_part_1(
    micro_batches: float | Schedule,
) -> None:
    loader = WindowLoader(store(), plan=plan(micro_batches=micro_batches), seed=3, shift_step=5)
    for step in range(12):
        for batch in loader.window(step):
            tokens = torch.cat([batch.tokens_BL, batch.targets_BL])
            inside = tokens < BOUNDARY if step < 5 else tokens >= BOUNDARY
            assert inside.all(), f"step {step}"


def test_every_sequence_of_a_part_is_read_once_in_an_epoch_in_another_order() -> None:
    """10 sequences before the boundary, 19 after it: 3 micro-batches are 12 sequences, and 5 are 20."""
    loader = WindowLoader(store(), plan=plan(), seed=3, shift_step=5)
    before = [begin for step in range(5) for begin in begins(loader.window(step))]
    after = [begin for step in range(5, 12) for begin in begins(loader.window(step))]
    assert sorted(before[:10]) == list(range(0, 40, 4))
    assert sorted(before[10:20]) == list(range(0, 40, 4))
    assert before[:10] != before[10:20]
    assert sorted(after[:19]) == list(range(BOUNDARY, BOUNDARY + 19 * 4, 4))
    assert after[:19] != sorted(after[:19])


def test_part_0_is_read_as_if_nothing_followed() -> None:
    alone = TokenStore(store().tokens[:BOUNDARY], np.zeros(1, dtype=np.int64), bytes=1)
    loader = WindowLoader(store(), plan=plan(), seed=3, shift_step=5)
    other = WindowLoader(alone, plan=plan(), seed=3)
    for step in range(5):
        assert begins(loader.window(step)) == begins(other.window(step))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one(world: int) -> None:
    whole = WindowLoader(store(), plan=plan(), seed=3, shift_step=5)
    ranks = [
        WindowLoader(store(), plan=plan(), seed=3, shift_step=5, rank=rank, world=world)
        for rank in range(world)
    ]
    for step in range(12):
        shares = [begin for rank in ranks for begin in begins(rank.window(step))]
        assert shares == begins(whole.window(step))


def test_a_loader_goes_on_from_any_step() -> None:
    whole = list(WindowLoader(store(), plan=plan(), seed=3, shift_step=5))
    for step in (3, 5, 8):
        resumed = WindowLoader(store(), plan=plan(), seed=3, shift_step=5)
        resumed.load_state_dict({"step": step})
        assert [begins(window) for window in resumed] == [begins(w) for w in whole[step:]]


@pytest.mark.parametrize(("at", "step"), [(0.5, 6), (0.04, None), (0.3, 4), (0.99, None)])
def test_the_shift_is_at_the_nearest_step(at: float, step: int | None) -> None:
    if step is not None:
        assert step_of_shift(at, 12) == step
        return
    with pytest.raises(UserError, match=f"the data shift at {at} of the run, and of its 12 steps"):
        step_of_shift(at, 12)


def halves(texts: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    names = list(texts)
    return {n: texts[n] for n in names[12:]}, {n: texts[n] for n in names[:12]}


def test_documents_are_ordered_by_part_and_the_stream_knows_the_boundary(
    texts: dict[str, bytes],
) -> None:
    """Part 0 has the later names."""
    before, after = halves(texts)
    corpus = Shifting(before, after, 0.5)
    split = read_split(corpus)
    assert [document.name for document in split.documents] == [*sorted(before), *sorted(after)]
    assert split.first_part == sum(document.part == 0 for document in split.train) == 12
    prepared = prepare(corpus, 300)
    assert prepared.train.shift == prepared.train.starts[12]
    assert prepared.shift_at == 0.5


def test_the_fingerprint_holds_the_shift_and_is_as_before_without_one(
    texts: dict[str, bytes], corpus_of: Callable[[Mapping[str, bytes]], Corpus]
) -> None:
    before, after = halves(texts)
    found = {prepare(Shifting(before, after, at), 300).fingerprint for at in (0.25, 0.5)}
    found |= {prepare(Shifting(dict(reversed(after.items())), before, 0.5), 300).fingerprint}
    plain = corpus_of(texts)
    found |= {prepare(plain, 300).fingerprint}
    assert len(found) == 4
    documents = read_split(plain).documents
    assert identity(documents, 300, "0.0.1", None) == identity(documents, 300, "0.0.1")
    assert prepare(plain, 300).train.shift is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"a": b"text"}, "the corpus has no text before the shift of its data"),
        ({"a": b"text"}, {"b": b""}, "the corpus has no text after the shift of its data"),
    ],
)
def test_a_part_without_text_is_one_sentence(
    before: dict[str, bytes], after: dict[str, bytes], expected: str
) -> None:
    with pytest.raises(UserError) as error:
        read_split(Shifting(before, after, 0.5))
    assert str(error.value) == expected


def test_a_part_shorter_than_a_sequence_is_one_sentence(texts: dict[str, bytes]) -> None:
    short = Shifting(texts, {"z": b"ab"}, 0.5)
    data = TextData(short, vocab=300, length=LENGTH, plan=plan(), seed=0, validation_sequences=4)
    with pytest.raises(UserError, match="training tokens after the shift, and one sequence of"):
        data.prepare()


def shift_of(lab: Lab, at: object = 0.5) -> str:
    """The override with which a lab's recipe reads one half of its texts after the other."""
    first = f"{{name: files, paths: ['{lab.texts}/doc-[01]*.txt']}}"
    then = f"{{name: files, paths: ['{lab.texts}/doc-[23]*.txt']}}"
    return f"data.corpus={{name: shift, first: {first}, then: {then}, at: {at}}}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("data.corpus.at=0", "must be between 0 and 1, and neither of them"),
        ("data.corpus.at=1.0", "must be between 0 and 1, and neither of them"),
        ("data.corpus.at=.nan", "must be finite"),
        ("data.corpus.first.paths=[]", "must hold at least one glob"),
    ],
)
def test_a_corpus_that_cannot_shift_is_one_sentence(lab: Lab, change: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        lab.recipe(shift_of(lab), change)
    assert expected in str(error.value)


def test_a_shift_of_a_shift_is_refused(lab: Lab) -> None:
    inner = shift_of(lab).removeprefix("data.corpus=")
    outer = f"data.corpus={{name: shift, first: {{name: package_text}}, then: {inner}}}"
    with pytest.raises(UserError, match="must not shift itself: a run has one shift"):
        lab.recipe(outer)


def test_each_corpus_must_have_something_to_read(lab: Lab) -> None:
    corpus = make(lab.recipe(shift_of(lab), "data.corpus.then.paths=[nowhere/*.txt]").data.corpus)
    with pytest.raises(UserError, match="matches no file"):
        corpus.check_source()
    corpus = make(lab.recipe(shift_of(lab)).data.corpus)
    corpus.check_source()
    names = [document.name for document in read_split(corpus).documents]
    assert names[0] == "first/doc-00.txt"
    assert names[-1] == "then/doc-30.txt"
    assert sum(name.startswith("first/") for name in names) == 20


@pytest.mark.full
def test_a_run_resumes_across_its_shift_to_the_same_bits_and_not_with_another_one(
    lab: Lab, tmp_path: Path
) -> None:
    """48 steps with a shift after 24; one copy goes on from step 20, the other from step 30."""
    long = (shift_of(lab), "budget.steps=48", "checkpoint={every_steps: 10, keep: 9}")
    straight = tmp_path / "straight"
    summary = lab.fit(straight, *long)
    assert summary["shift_step"] == 24
    assert isinstance(summary["steps_until_balanced"], int)
    assert summary["max_vio_peak_after_shift"] > 0
    for step in (20, 30):
        copy = tmp_path / f"from-{step}"
        shutil.copytree(straight, copy)
        (copy / "summary.json").unlink()
        for file in checkpoints_in(copy):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()
        with pytest.raises(UserError, match="the corpus has changed since this run began"):
            lab.fit(copy, *long, "data.corpus.at=0.25", resume=True)
        again = lab.fit(copy, *long, resume=True)
        assert_same_run(copy, straight)
        for key in ("val_loss", "steps_until_balanced", "max_vio_before_shift"):
            assert again[key] == summary[key]
