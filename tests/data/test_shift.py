"""Data that shift in the middle of a run: what each step reads, and what identifies it."""

import gzip
import json
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
from core.data.documents import fingerprint, read_all
from core.data.held_out import HeldOut, read_split
from core.data.loaders import WindowLoader
from core.data.module import TextData
from core.data.parts import step_of_shift
from core.data.prepare import prepare
from core.data.recorded import FORMAT
from core.data.store import TokenStore
from core.data.tokenizer import VERSION
from core.recipe.plan import TrainingPlan
from core.run.reading import source_lines

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


class InOrder(Shifting):
    """The same in order of parts and names, if each part's names are in order."""

    def documents(self) -> Iterator[Document]:
        for part, texts in enumerate(self.texts):
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
    assert split.first == sum(document.part == 0 for document in split.train) == 12
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
    documents = sorted(plain.documents(), key=lambda document: document.name)
    kept = [document for document in documents if document.data]
    assert prepare(plain, 300).fingerprint == fingerprint(kept, FORMAT, VERSION, 300)
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


def test_a_corpus_that_is_read_again_is_ordered_and_split_like_one_in_memory(
    texts: dict[str, bytes],
) -> None:
    """In memory, in order without memory, and out of order, where it must be sorted in memory."""
    before, after = halves(texts)
    first = {f"a/{name}": before[name] for name in sorted(before)}
    then = {f"b/{name}": after[name] for name in sorted(after)}
    in_order = InOrder(first, then, 0.5)
    expected = [("first", name) for name in first] + [("then", name) for name in then]
    for corpus, in_memory in ((in_order, 1 << 20), (in_order, 0), (Shifting(first, then, 0.5), 0)):
        documents = read_all(corpus, in_memory=in_memory)
        found = [(("first", "then")[document.part], document.name) for document in documents]
        assert found == [pair for pair in expected if texts[pair[1][2:]]]
        assert documents.first == sum(pair[0] == "first" for pair in found)


def test_two_parts_that_share_a_name_are_refused_however_they_are_read() -> None:
    names = dict.fromkeys("abc", b"text")
    for in_memory in (0, 1 << 20):
        with pytest.raises(UserError, match="two documents are named 'a'"):
            read_all(InOrder(names, names, 0.5), in_memory=in_memory)


@pytest.mark.parametrize("fraction", [0.25, 0.02])
def test_a_fraction_is_held_out_of_both_parts_together(
    texts: dict[str, bytes], fraction: float
) -> None:
    """A quarter of the documents, or the end of every document where there are too few for 2 %."""
    before, after = halves(texts)
    split = read_split(Shifting(before, after, 0.5), HeldOut(fraction))
    parts = [document.part for document in split.train]
    assert parts == sorted(parts)
    assert split.first == parts.count(0)
    prepared = prepare(Shifting(before, after, 0.5), 300, held_out=HeldOut(fraction))
    assert prepared.train.shift == prepared.train.starts[split.first]


def test_a_validation_corpus_takes_nothing_from_either_part(
    texts: dict[str, bytes], corpus_of: Callable[[Mapping[str, bytes]], Corpus]
) -> None:
    before, after = halves(texts)
    shifting = Shifting(before, after, 0.5)
    own = corpus_of({"z": b"a text of its own"})
    prepared = prepare(shifting, 300, held_out=HeldOut(corpus=own))
    kept = [text for text in before.values() if text]
    assert prepared.train.shift == prepared.train.starts[len(kept)]
    assert prepared.train.documents == sum(bool(text) for text in texts.values())
    with pytest.raises(UserError, match=r"^data\.validation must not shift: "):
        prepare(shifting, 300, held_out=HeldOut(corpus=shifting))


def records_of(folder: Path) -> tuple[str, str]:
    """A file of records and a compressed one of Markdown, as sections of `files`."""
    lines = [json.dumps({"body": f"record {number} " * 40}) for number in range(12)]
    (folder / "first.jsonl").write_text("\n".join(lines))
    with gzip.open(folder / "then.md.gz", "wt") as stream:
        stream.write("# Title\n\nwords of another kind " * 30)
    first = f"{{name: files, paths: ['{folder}/first.jsonl'], text_key: body}}"
    return first, f"{{name: files, paths: ['{folder}/*.md.gz']}}"


def test_the_sides_may_be_any_files(lab: Lab, tmp_path: Path) -> None:
    first, then = records_of(tmp_path)
    recipe = lab.recipe(f"data.corpus={{name: shift, first: {first}, then: {then}}}")
    prepared = prepare(make(recipe.data.corpus), 270)
    assert (prepared.train.documents, prepared.validation.documents) == (12, 1)
    assert prepared.train.shift == prepared.train.starts[11]


def test_a_side_of_token_ids_or_a_mixture_is_one_sentence(lab: Lab, tmp_path: Path) -> None:
    first, then = records_of(tmp_path)
    (tmp_path / "ids.jsonl").write_text('{"text": [1, 2, 3]}\n')
    ids = f"{{name: files, paths: ['{tmp_path}/ids.jsonl']}}"
    corpus = make(
        lab.recipe(f"data.corpus={{name: shift, first: {first}, then: {ids}}}").data.corpus
    )
    with pytest.raises(UserError) as error:
        prepare(corpus, 300)
    why = "holds token ids, and a shift is between corpora of text"
    assert str(error.value) == f"data.corpus.then {why}"
    mixture = f"{{name: mixture, corpora: {{a: {first}}}, weights: {{a: 1}}}}"
    with pytest.raises(UserError, match=r"first.*: must be one corpus: a mixture cannot be a side"):
        lab.recipe(f"data.corpus={{name: shift, first: {mixture}, then: {then}}}")
    shifting = f"{{name: shift, first: {first}, then: {then}}}"
    recipe = lab.recipe(
        f"data.corpus={{name: mixture, corpora: {{a: {shifting}}}, weights: {{a: 1}}}}"
    )
    with pytest.raises(UserError, match=r"^the part 'a' of a mixture must not shift: "):
        prepare(make(recipe.data.corpus), 300)


def test_a_run_says_how_often_it_reads_each_side(texts: dict[str, bytes]) -> None:
    """12 steps of 4 sequences, 5 of them before the shift."""
    before, after = halves(texts)
    shifting = Shifting(before, after, 5 / 12)
    data = TextData(shifting, vocab=300, length=LENGTH, plan=plan(), seed=0, validation_sequences=4)
    store = prepare(shifting, 300).train
    assert store.shift is not None
    counts = [(store.shift - 1) // LENGTH, (len(store) - store.shift - 1) // LENGTH]
    assert data.epochs_around_shift() == (20 / counts[0], 28 / counts[1])
    assert data.epochs() == 48 / sum(counts)
    assert source_lines(data) == [
        f"  until the shift after step 5: {20 / counts[0]:.3g} epochs",
        f"  after the shift: {28 / counts[1]:.3g} epochs",
    ]


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
