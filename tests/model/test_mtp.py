"""Multi-token prediction (report, section 2.2): causality, divisor, masks, sharing."""

import pytest
import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel

from . import tiny

LENGTH = 8


def depth_logits(model: LanguageModel, context: SequenceContext) -> list[Tensor]:
    """What each depth predicts, in order; the first entry is the main model's."""
    states = [model.hidden(context)[0]]
    hooks = [
        depth.register_forward_hook(lambda _, __, output: states.append(output[0]))
        for depth in model.get_submodule("heads.mtp.depths").children()
    ]
    model(context)
    for hook in hooks:
        hook.remove()
    return [model.output(state_BLD) for state_BLD in states]


def changed(context: SequenceContext, position: int) -> SequenceContext:
    """The same batch with another token at one position."""
    tokens_BL = context.tokens_BL.clone()
    tokens_BL[:, position] = (tokens_BL[:, position] + 1) % tiny.VOCABULARY
    return SequenceContext.of(tokens_BL, targets_BL=context.targets_BL)


@pytest.mark.parametrize("position", range(LENGTH))
def test_A11_depth_k_at_position_i_sees_the_tokens_up_to_i_plus_k(position: int) -> None:
    """Depth 1 at i is unchanged by t_{i+2}, t_{i+3}, ... and changed by t_{i+1}; every depth alike."""
    model, context = tiny.build(*tiny.MTP), tiny.context(length=LENGTH)
    pairs = zip(
        depth_logits(model, context), depth_logits(model, changed(context, position)), strict=True
    )
    for depth, (before, after) in enumerate(pairs):
        moved_L = (before - after).abs().amax(dim=(0, 2)) > 1e-9
        first = max(position - depth, 0)
        assert not moved_L[:first].any(), f"depth {depth} sees too far"
        assert moved_L[first:].all(), f"depth {depth} misses the token"


def test_A11_rows_and_targets() -> None:
    """Depth k has L - k rows; its term is the cross-entropy of t_{i+k+1}."""
    model, context = tiny.build(*tiny.MTP), tiny.context(length=LENGTH)
    terms = tiny.see(model, context).terms
    for k, logits_BLV in enumerate(depth_logits(model, context)[1:], start=1):
        assert logits_BLV.shape == (2, LENGTH - k, tiny.VOCABULARY)
        targets = context.targets_BL[:, k:]
        expected = -logits_BLV.log_softmax(dim=-1).gather(2, targets[..., None]).sum()
        torch.testing.assert_close(terms[f"mtp/depth_{k}"].sum, expected, rtol=1e-12, atol=0)


def test_A12_the_divisor_is_the_main_losss() -> None:
    """Eq. 24: T, not T - k; with padding the predicted positions of the main loss."""
    valid_BL = torch.tensor([[True] * LENGTH, [True] * 3 + [False] * 5])
    model = tiny.build(*tiny.MTP)
    documents_BM = torch.tensor([[0] * 3 + [1] * 6, [2] * 8 + [3]])
    for given, predicted in (
        ({}, 16),
        ({"valid_BL": valid_BL}, 11),
        ({"documents_BM": documents_BM}, 14),
    ):
        context = tiny.context(length=LENGTH, **given)
        terms = tiny.see(model, context).terms
        counts = {
            name: int(term.count) for name, term in terms.items() if not name.startswith("balance/")
        }
        assert counts == {
            "next_token": predicted,
            "mtp/depth_1": predicted,
            "mtp/depth_2": predicted,
        }
        assert {name: int(count) for name, count in model.heads["mtp"].counts(context).items()} == {
            "depth_1": predicted,
            "depth_2": predicted,
        }
    assert list(counts) == ["next_token", "mtp/depth_1", "mtp/depth_2"]


def test_A12_the_coefficient_is_lambda_over_depths_and_follows_its_schedule() -> None:
    weight = "{start: 0.3, segments: [{shape: constant, until: 0.5}, {shape: constant, to: 0.1, until: 1.0}]}"
    head = tiny.build(*tiny.MTP, f"model.heads.mtp.weight={weight}").heads["mtp"]
    assert head.coefficient(Progress(1, 50, 10, 100)) == pytest.approx(0.15)
    assert head.coefficient(Progress(1, 51, 10, 100)) == pytest.approx(0.05)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(
    "given",
    [
        {"valid_BL": torch.zeros(2, LENGTH, dtype=torch.bool)},
        {"documents_BM": torch.arange(2 * (LENGTH + 1)).view(2, LENGTH + 1)},
    ],
    ids=["all padding", "one-token documents"],
)
def test_P17_a_batch_with_nothing_to_predict_gives_zero(
    given: dict[str, Tensor], precision: str
) -> None:
    """Means are 0, not NaN, and every gradient is 0."""
    model, context = (
        tiny.build(*tiny.MTP, f"precision.name={precision}"),
        tiny.context(length=LENGTH, **given),
    )
    terms = tiny.see(model, context).terms
    predicted = {
        name: term for name, term in terms.items() if not name.startswith("balance/blocks")
    }
    assert {term.mean().item() for term in predicted.values()} == {0.0}
    assert {int(term.count) for term in predicted.values()} == {0}
    grads = tiny.backward(
        model, tiny.weighted({name: term.mean() for name, term in predicted.items()})
    )
    assert not any(g.any() for g in grads.values())
    assert all(
        g.isfinite().all() for g in tiny.backward(model, tiny.see(model, context).total()).values()
    )


@pytest.mark.parametrize("length", [1, 2])
def test_P17_sequences_shorter_than_the_depths(length: int) -> None:
    """Depth 2 of one or two tokens has no row: 0, with zero loads."""
    model = tiny.build(*tiny.MTP)
    seen = tiny.see(model, tiny.context(length=length))
    assert seen.terms["mtp/depth_2"].mean().item() == 0
    assert not seen.loads["heads.mtp.depths.1.block"].any()
    assert all(g.isfinite().all() for g in tiny.backward(model, seen.total()).values())


def test_P17_embedding_and_output_are_the_models_own() -> None:
    """Saved once, and trained by both: the head owns neither."""
    model = tiny.build(*tiny.MTP)
    vocabulary = [
        name for name, tensor in model.state_dict().items() if tiny.VOCABULARY in tensor.shape
    ]
    assert vocabulary == ["embedding.weight", "output.weight"]
    grads = tiny.backward(model, tiny.see(model, tiny.context()).terms["mtp/depth_2"].sum)
    assert grads["embedding.weight"].any()
    assert grads["output.weight"].any()


def test_P17_the_order_is_embedding_then_hidden() -> None:
    """The released weights' order: with the second half of M at 0 the main model gets no gradient."""
    model = tiny.build(*tiny.MTP, "model.heads.mtp.depth=1", "model.heads.mtp.weight=1")
    projection = model.get_submodule("heads.mtp.depths.0.projection")
    with torch.no_grad():
        projection.weight[:, 32:] = 0
    grads = tiny.backward(model, tiny.see(model, tiny.context()).terms["mtp/depth_1"].sum)
    assert not any(g.any() for name, g in grads.items() if name.startswith(("blocks.", "norm.")))
    assert grads["heads.mtp.depths.0.embedding_norm.weight"].any()


def test_P4_every_layer_with_experts_is_found_and_has_a_record() -> None:
    """The search finds those of multi-token modules too, under the same paths as their records."""
    model = tiny.build(*tiny.MTP)
    records = model(tiny.context()).expert_records()
    assert list(model.expert_layers()) == list(records)
    assert list(records) == [
        "blocks.1",
        "blocks.2",
        "heads.mtp.depths.0.block",
        "heads.mtp.depths.1.block",
    ]
    loads = [int(record.load_E.sum()) for record in records.values()]
    assert loads == [2 * 8 * 2, 2 * 8 * 2, 2 * 7 * 2, 2 * 6 * 2]


def test_documents_end_a_depths_predictions() -> None:
    """Depth k masks the last k positions of every document; those rows are in no expert's load."""
    documents_BM = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2], [3] * 9])
    context = tiny.context(length=LENGTH, documents_BM=documents_BM)
    assert context.predicted(0).tolist() == [
        [True] * 3 + [False] + [True] * 3 + [False],
        [True] * 8,
    ]
    assert context.predicted(1).tolist() == [
        [True, True, False, False, True, True, False],
        [True] * 7,
    ]
    assert context.predicted(2).tolist() == [[True, False, False, False, True, False], [True] * 6]
    loads = tiny.see(tiny.build(*tiny.MTP), context).loads
    assert int(loads["heads.mtp.depths.0.block"].sum()) == 2 * (4 + 7)
    assert int(loads["heads.mtp.depths.1.block"].sum()) == 2 * (2 + 6)


def test_a_document_does_not_reach_another_ones_predictions() -> None:
    """Counted logits of every depth in document B are the same whatever document A contains."""
    documents_BM = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    model, context = tiny.build(*tiny.MTP), tiny.context(length=LENGTH, documents_BM=documents_BM)
    before = depth_logits(model, context)
    for position in (0, 3):
        other = SequenceContext.of(
            changed(context, position).tokens_BL,
            targets_BL=context.targets_BL,
            documents_BM=documents_BM,
        )
        for after, earlier in zip(depth_logits(model, other), before, strict=True):
            torch.testing.assert_close(after[:, 4:], earlier[:, 4:], rtol=1e-12, atol=1e-12)
    for position in (4, 7):
        other = SequenceContext.of(
            changed(context, position).tokens_BL,
            targets_BL=context.targets_BL,
            documents_BM=documents_BM,
        )
        for depth, (after, earlier) in enumerate(
            zip(depth_logits(model, other), before, strict=True)
        ):
            rows = context.predicted(depth)[0, : 4 - depth].nonzero().flatten()
            torch.testing.assert_close(after[:, rows], earlier[:, rows], rtol=1e-12, atol=1e-12)


def test_acceptance_is_how_often_a_depth_agrees_with_the_main_model() -> None:
    """Depth k's best token at i is compared with the main model's at i + k, both for t_{i+k+1}; in evaluation only."""
    valid_BL = torch.tensor([[True] * 20, [True] * 15 + [False] * 5])
    model, context = tiny.build(*tiny.MTP), tiny.context(length=20, valid_BL=valid_BL)
    with torch.no_grad():
        model.output.weight[3:] = 0  # few tokens to choose from, so that chance agreements are many
    assert all(not head.metrics for head in model.train()(context).heads.values())
    metrics = model.eval()(context).heads["mtp"].metrics
    best = [logits.argmax(dim=-1) for logits in depth_logits(model, context)]
    for k in (1, 2):
        rows = [(b, i) for b in range(2) for i in range(20 - k) if valid_BL[b, i + k]]
        agree = sum(int(best[k][b, i]) == int(best[0][b, i + k]) for b, i in rows)
        assert int(metrics[f"acceptance_{k}"].sum) == agree
        assert int(metrics[f"acceptance_{k}"].count) == len(rows) == 35 - 2 * k
        assert 0 < agree < len(rows)


def test_acceptance_is_full_where_the_depth_repeats_the_main_model() -> None:
    """Guards the alignment: an output that always prefers the same token agrees everywhere."""
    model, context = tiny.build(*tiny.MTP).eval(), tiny.context(length=LENGTH)
    with torch.no_grad():
        model.output.weight[:] = 0
        metrics = model(context).heads["mtp"].metrics
    assert {name: int(metric.sum) == int(metric.count) for name, metric in metrics.items()} == {
        "acceptance_1": True,
        "acceptance_2": True,
    }
