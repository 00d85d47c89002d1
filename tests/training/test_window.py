"""A window is one step: nothing depends on how it is cut into micro-batches."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lab import MOE, Lab, flat
from tiers import first_by_default
from torch import Tensor

from core.assemble import build
from core.data.batch import Batch
from core.model.ledger import Ledger
from core.training.module import TrainingModule

FP64 = ("precision.name=fp64", "gradient_clip=null")
LENGTH = 16


class Gradients(L.Callback):
    """Keeps every step's gradients as the optimizer is about to use them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        self.steps.append(
            {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        )


def padded(lengths: Sequence[int], seed: int = 0) -> Batch:
    """Random sequences of which only the first tokens, as many as given, are not padding; 0 gives only padding."""
    draw = torch.Generator().manual_seed(seed)
    tokens_BM = torch.randint(300, (len(lengths), LENGTH + 1), generator=draw)
    valid_BL = torch.arange(LENGTH)[None, :] < torch.tensor(lengths)[:, None]
    documents_BM = torch.arange(len(lengths))[:, None].expand(-1, LENGTH + 1)
    return Batch(tokens_BM[:, :-1] * valid_BL, tokens_BM[:, 1:] * valid_BL, valid_BL, documents_BM)


def cut(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The same sequences as several micro-batches."""
    parts = [part.split(list(sizes)) for part in batch if part is not None]
    return [Batch(*pieces) for pieces in zip(*parts, strict=True)]


def assert_close(actual: Any, expected: Any) -> None:
    """Every leaf agrees to 1e-9, integers and formats exactly."""
    one, two = flat(actual), flat(expected)
    assert one.keys() == two.keys()
    for path, value in two.items():
        other = torch.as_tensor(one[path])
        value = torch.as_tensor(value)
        assert other.dtype == value.dtype, path
        if value.is_floating_point():
            assert torch.allclose(other, value, rtol=1e-9, atol=1e-9), path
        else:
            assert torch.equal(other, value), path


def after(module: TrainingModule, gradients: Gradients) -> dict[str, Any]:
    """Everything that training changes: weights, buffers, optimizer state and logged values."""
    return {
        "weights": module.model.state_dict(),
        "gradients": gradients.steps,
        "values": module.step_values,
        "loads": module.step_load,
    }


@pytest.mark.parametrize("mask", first_by_default(["true", "false"]))
def test_P9_accumulation_changes_no_gradient_weight_bias_or_log(lab: Lab, mask: str) -> None:
    found = []
    for sequences, accumulate in ((8, 1), (2, 4), (1, 8)):
        watch = Gradients()
        batch = f"batch={{sequences: {sequences}, accumulate: {accumulate}}}"
        module = lab.train(
            *FP64, batch, f"data.mask_documents={mask}", "budget.steps=2", callbacks=[watch]
        )
        found.append(after(module, watch))
    assert len(found[0]["gradients"]) == 2
    for other in found[1:]:
        assert_close(other, found[0])


def test_the_sequences_of_a_step_have_the_same_numbers_however_it_is_split(lab: Lab) -> None:
    """Compares the addresses of random choices; neither micro-batches nor steps change them."""
    seen: dict[tuple[int, int], list[list[int]]] = {}

    class Numbers(L.Callback):
        def on_train_batch_start(
            self, trainer: Any, module: Any, window: list[Batch], index: int
        ) -> None:
            contexts = [module.context(batch, number) for number, batch in enumerate(window)]
            split = (len(window[0].tokens_BL), len(window))
            rows = [c.first_sequence + row for c in contexts for row in range(len(c.tokens_BL))]
            seen.setdefault(split, []).append(rows)

    for sequences, accumulate in ((8, 1), (2, 4), (1, 8)):
        batch = f"batch={{sequences: {sequences}, accumulate: {accumulate}}}"
        lab.train(batch, "budget.steps=2", callbacks=[Numbers()])
    assert seen == {split: [list(range(8))] * 2 for split in ((8, 1), (2, 4), (1, 8))}


@pytest.mark.parametrize("sizes", first_by_default([(1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)]))
def test_P9_micro_batches_with_unequal_padding_give_the_gradient_of_the_whole(
    lab: Lab, sizes: tuple[int, ...]
) -> None:
    batch = padded([16, 3, 9, 0, 1, 12])
    found = []
    for cuts in ((6,), sizes):
        watch = Gradients()
        module = lab.train(*FP64, windows=[cut(batch, cuts)], callbacks=[watch])
        found.append(after(module, watch))
    terms = {"loss/next_token", "loss/mtp/depth_1", "loss/balance/sequence"}
    assert terms <= found[0]["values"].keys()
    assert all(found[0]["values"][term] > 0 for term in terms)
    assert_close(found[1], found[0])


def test_P6_padding_is_not_counted_anywhere(lab: Lab) -> None:
    whole = padded([16, 5])
    other = whole._replace(tokens_BL=torch.where(whole.valid_BL, whole.tokens_BL, 7))
    one, two = (lab.train(*FP64, windows=[[batch]]) for batch in (whole, other))
    assert_close(one.model.state_dict(), two.model.state_dict())
    main, mtp = MOE
    assert int(one.step_load[main].sum()) == (16 + 5) * 2
    assert int(one.step_load[mtp].sum()) == (15 + 4) * 2


def test_P24_the_loss_is_a_mean_over_the_windows_tokens_and_not_a_mean_of_means(lab: Lab) -> None:
    window = [padded([16, 16], seed=1), padded([2, 1], seed=2)]
    module = lab.train(*FP64, windows=[window])
    fresh = build(lab.recipe(*FP64))
    (term, *_), sums, means = Ledger.of(fresh).heads, [], []
    assert term.label == "next_token"
    with torch.no_grad():
        for batch in window:
            context = module.context(batch)
            value = float(term.sum_in(fresh(context)))
            sums.append((value, int(term.count(context, fresh.contexts(context)))))
            means.append(value / sums[-1][1])
    assert [count for _, count in sums] == [32, 3]
    expected = sum(total for total, _ in sums) / 35
    assert float(module.step_values["loss/next_token"]) == pytest.approx(expected, rel=1e-12)
    assert abs(expected - sum(means) / 2) > 1e-3


def test_P8_the_logged_total_is_the_sum_of_the_terms_with_their_coefficients(lab: Lab) -> None:
    module = lab.train(*FP64, "budget.steps=1")
    values = {name: float(value) for name, value in module.step_values.items()}
    balance = values["loss/balance/sequence"] * len(MOE)
    terms = values["loss/next_token"] + 0.3 * values["loss/mtp/depth_1"] + balance
    assert values["loss/total"] == pytest.approx(terms, rel=1e-12)


def test_the_whole_gradient_is_clipped_once_by_its_global_norm(lab: Lab) -> None:
    free, clipped = Gradients(), Gradients()
    lab.train("precision.name=fp64", "gradient_clip=null", "budget.steps=1", callbacks=[free])
    module = lab.train(
        "precision.name=fp64", "gradient_clip=0.1", "budget.steps=1", callbacks=[clipped]
    )
    norm = torch.stack([gradient.norm() for gradient in free.steps[0].values()]).norm()
    assert float(module.step_values["grad_norm"]) == pytest.approx(float(norm), rel=1e-12)
    for name, gradient in free.steps[0].items():
        torch.testing.assert_close(
            clipped.steps[0][name], gradient * (0.1 / norm), rtol=1e-5, atol=1e-12
        )


def test_a_batch_ramp_reads_its_windows_and_counts_their_tokens(lab: Lab) -> None:
    ramp = "batch.accumulate={unit: steps, start: 1, segments: [{until: 1}, {until: 9, to: 3}]}"
    seen: list[tuple[int, float]] = []

    class Windows(L.Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen.append((int(pl_module.step_load[MOE[0]].sum()), pl_module.step_values["tokens"]))
            assert pl_module.flops_per_batch == len(batch) * 64

    lab.train(ramp, "batch.sequences=4", "budget.steps=4", callbacks=[Windows()])
    assert seen == [(128, 64), (128, 128), (384, 320), (384, 512)]


def test_P5_a_layer_that_the_forward_does_not_report_is_an_error(lab: Lab) -> None:
    def forget(model: Any) -> None:
        forward = model.forward

        def without(context: Any) -> Any:
            losses = forward(context)
            losses.records.pop(MOE[1])
            return losses

        model.forward = without

    with pytest.raises(RuntimeError, match=MOE[1]):
        lab.train("budget.steps=1", model=forget)
