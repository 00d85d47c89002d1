"""Runs on packed and on rearranged documents: they resume to the bit, and packed documents do not see each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lab import Lab, assert_same, last_checkpoint, rows
from rank_runs import cut_after

from core.analysis.budget import plan_of
from core.assemble import build
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.data.batch import Batch
from core.run.data import text_data
from core.run.environment import check_environment

FIM = "data.fim={rate: 0.5}"
BEST_FIT = "data.packing=best_fit"


@pytest.mark.full
def test_a_run_resumes_to_the_bit_and_can_be_evaluated(lab: Lab, tmp_path: Path) -> None:
    overrides = (FIM, BEST_FIT, "budget.steps=8", "checkpoint={every_steps: 4, keep: 9}")
    lab.fit(tmp_path / "run", *overrides)
    again = cut_after(tmp_path / "run", 4, tmp_path / "again")
    lab.fit(again, *overrides, resume=True)
    end, other = last_checkpoint(tmp_path / "run"), last_checkpoint(again)
    assert_same(other["state_dict"], end["state_dict"])
    assert_same(rows(again), rows(tmp_path / "run"))
    with pytest.raises(UserError, match=r"data\.(fim|packing)"):
        lab.fit(again, "budget.steps=8", resume=True)
    result = lab.command("evaluate", tmp_path / "run")
    assert result.code == 0, result.err


@pytest.mark.full
def test_the_start_of_a_run_says_what_was_done_with_documents(lab: Lab, tmp_path: Path) -> None:
    result = lab.command(
        "fit", lab.file, FIM, BEST_FIT, "budget.steps=1", "--out", tmp_path / "run"
    )
    assert result.code == 0, result.err
    said = result.out + result.err
    assert "  fim: " in said
    assert "of their places are padding" in said


def test_with_masks_a_packed_document_has_the_loss_that_it_has_alone(lab: Lab) -> None:
    recipe = lab.recipe(
        BEST_FIT, "precision={name: fp64}", "data.mask_documents=true", "data.sequence_length=160"
    )
    data = text_data(recipe, plan_of(recipe))
    data.prepare()
    model = build(recipe).eval()
    sequences = data._sequences
    numbers = np.arange(int(sequences.counts[0]))[:4]
    batch = sequences.cut(np.zeros_like(numbers), numbers)

    def loss(one: Batch) -> float:
        context = SequenceContext.of(
            one.tokens_BL,
            targets_BL=one.targets_BL,
            valid_BL=one.valid_BL,
            documents_BM=one.documents_BM,
            learned_BM=one.learned_BM,
        )
        return float(model(context).heads["next_token"].terms["next_token"].detach())

    alone = 0.0
    count = 0
    for row in range(len(numbers)):
        held = batch.documents_BM[row, :-1]
        for document in sorted(set(held[batch.valid_BL[row]].tolist())):
            places = torch.nonzero(held == document).flatten()
            begin, end = int(places[0]), int(places[-1]) + 1
            part = Batch(
                batch.tokens_BL[row : row + 1, begin:end],
                batch.targets_BL[row : row + 1, begin:end],
                batch.valid_BL[row : row + 1, begin:end],
                batch.documents_BM[row : row + 1, begin : end + 1],
                None
                if batch.learned_BM is None
                else batch.learned_BM[row : row + 1, begin : end + 1],
            )
            alone += loss(part)
            count += 1
    assert count > len(numbers), "no sequence holds two documents"
    assert loss(batch) == pytest.approx(alone, rel=1e-9)


BAD = {
    "data.fim={rate: 0}": "data.fim.rate = 0: must be more than 0 and at most 1",
    "data.fim={rate: 1.5}": "data.fim.rate = 1.5: must be more than 0 and at most 1",
    "data.fim={rate: .nan}": "data.fim.rate = nan: must be finite",
    "data.fim={tokens: [a, b]}": "data.fim.tokens = ['a', 'b']: must be three different texts",
    "data.fim={tokens: [a, b, a]}": "must be three different texts",
    "data.fim={mode: spm}": "data.fim.mode: unknown key",
    "data.packing=greedy": "data.packing = 'greedy': must be one of stream, best_fit",
}


@pytest.mark.parametrize(("override", "sentence"), BAD.items())
def test_a_mistake_is_one_sentence(lab: Lab, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as wrong:
        lab.recipe(override)
    assert sentence in str(wrong.value)


def test_token_ids_are_not_rearranged_which_is_known_before_a_run(lab: Lab, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.uint16))
    corpus = f"data.corpus={{name: tokens, paths: ['{tmp_path}/a.npy']}}"
    with pytest.raises(
        UserError, match=r"small\.yaml: data\.fim: must be null for a corpus of token ids"
    ):
        check_environment(lab.recipe(corpus, FIM))
    check_environment(lab.recipe(corpus, BEST_FIT))
    with pytest.raises(UserError, match="vocab = 258 is too small: it must be at least 260"):
        check_environment(lab.recipe(FIM, "data.tokenizer.vocab=258"))


MIXED = (
    "data.corpus={{name: mixture, corpora: {{one: {{name: files, paths: ['{t}/doc-0*.txt']}}, "
    "two: {{name: files, paths: ['{t}/doc-[12]*.txt']}}}}, weights: {{one: 1.0, two: 3.0}}}}"
)
SHIFTED = (
    "data.corpus={{name: shift, first: {{name: files, paths: ['{t}/doc-0*.txt']}}, "
    "then: {{name: files, paths: ['{t}/doc-[12]*.txt']}}, at: 0.5}}"
)


@pytest.mark.full
@pytest.mark.parametrize("corpus", [MIXED, SHIFTED], ids=["mixture", "shift"])
def test_mixtures_and_shifts_are_packed_and_rearranged(
    lab: Lab, tmp_path: Path, corpus: str
) -> None:
    """Each sequence holds documents of one part, and the run ends."""
    overrides = (corpus.format(t=lab.texts), FIM, BEST_FIT, "budget.steps=4")
    summary = lab.fit(tmp_path / "run", *overrides, "data.validation_fraction=0.1")
    assert summary["steps"] == 4
    assert summary["val_loss"] is not None
