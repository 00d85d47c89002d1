"""Sparse attention: the indexer, what it chooses, and the loss that it learns from."""

import copy
from typing import Any

import pytest
import torch
from saved_tensors import saved_bytes
from tiers import first_by_default
from torch import Tensor

import core
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.record import Record
from core.contracts.schedule import Progress
from core.model.ledger import Ledger
from core.numerics.highest import highest
from core.training.totals import WindowTotals, learning_alone
from core.training.window import Window, objective
from plugins.sparse import scores
from plugins.sparse.attention import SparseAttention

from . import tiny
from .sparse_reference import Widths, best, sparse_attention
from .test_recompute import RECOMPUTE, Ops

TOP_K = 3
SPARSE = tiny.SPARSE
WARMUP = (*SPARSE, "model.attention.warmup_steps=4")
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [3] * 9])


def layer(*overrides: str) -> SparseAttention:
    """The attention of the first block of the tiny model."""
    found: SparseAttention = tiny.build(*SPARSE, *overrides).blocks[0].attention
    return found


def states(batch: int = 2, length: int = 8, seed: int = 5) -> Tensor:
    """Random inputs of the layer."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 32, dtype=torch.float64, generator=draw)


def run(module: Any, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Record]:
    """The output and the record of a layer."""
    output_BLD, record = module(x_BLD, context)
    return output_BLD, record


def widths(recipe: Any) -> Widths:
    """The settings of the reference that a recipe implies."""
    c = recipe.model.attention.config
    return Widths(
        c.heads,
        c.nope_dim,
        c.rope_dim,
        c.value_dim,
        c.index_heads,
        c.top_k,
        recipe.model.rope.theta,
        recipe.model.norm_eps,
    )


def gradients_of(module: Any, x_BLD: Tensor, value: Tensor) -> dict[str, Tensor]:
    """The gradients of a number for every weight and the input; zeros where none comes."""
    named = {**dict(module.named_parameters()), "x": x_BLD}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(named.items(), found, strict=True)
    }


# ---- against loops


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_outputs_losses_and_gradients_are_those_of_loops(
    documents: Tensor | None, dense: bool
) -> None:
    module = layer("model.attention.warmup_steps=4")
    module.on_step_start(tiny.START if dense else Progress(5, 5, 10, 10))
    assert module.dense is not None
    assert bool(module.dense) is dense
    valid_BL = torch.ones(2, 8, dtype=torch.bool)
    valid_BL[1, 6:] = False
    context = tiny.context(documents_BM=documents, valid_BL=valid_BL)
    x_BLD = states().requires_grad_()
    output_BLD, record = run(module, x_BLD, context)
    weights = dict(module.named_parameters())
    expected, loss = [], torch.zeros((), dtype=torch.float64)
    settings = widths(tiny.compose(*SPARSE))
    for row in range(2):
        which = [0] * 8 if documents is None else documents[row].tolist()
        found, divergences, chosen = sparse_attention(
            x_BLD[row], weights, settings, which, dense=dense
        )
        expected.append(found)
        loss = loss + sum(
            d for d, is_valid in zip(divergences, valid_BL[row], strict=True) if is_valid
        )
        assert dense or max(map(len, chosen)) == TOP_K
    expected_BLD = torch.stack(expected)
    torch.testing.assert_close(output_BLD, expected_BLD, rtol=0, atol=1e-12)
    torch.testing.assert_close(record.terms["indexer"], loss, rtol=1e-11, atol=1e-12)
    probe_BLD = states(seed=6)
    own = gradients_of(module, x_BLD, (output_BLD * probe_BLD).sum() + record.terms["indexer"])
    slow = gradients_of(module, x_BLD, (expected_BLD * probe_BLD).sum() + loss)
    tiny.assert_close(own, slow, 1e-10)


def test_the_indexer_learns_from_its_loss_alone_and_all_else_from_the_output() -> None:
    module, x_BLD = layer(), states().requires_grad_()
    output_BLD, record = run(module, x_BLD, tiny.context())
    of_output = gradients_of(module, x_BLD, output_BLD.square().sum())
    of_loss = gradients_of(module, x_BLD, record.terms["indexer"])
    for name in of_loss:
        has_indexer = name.startswith("indexer.")
        assert bool(of_loss[name].any()) is has_indexer, name
        assert bool(of_output[name].any()) is not has_indexer, name


def test_with_no_more_positions_than_top_k_the_result_is_latent_attentions_to_the_bit() -> None:
    sparse = tiny.build(*SPARSE, "model.attention.top_k=8", *tiny.FP32).eval()
    mla = tiny.build(*tiny.FP32).eval()
    weights = {n: w for n, w in sparse.state_dict().items() if ".indexer." not in n}
    mla.load_state_dict(weights)
    tokens_BL = tiny.context().tokens_BL
    assert torch.equal(sparse.logits(tokens_BL), mla.logits(tokens_BL))


def test_a_query_without_many_positions_before_it_attends_to_all() -> None:
    """The first rows of a long sequence are those of latent attention."""
    module, x_BLD = layer(), states()
    long_BLD, _ = run(module, x_BLD, tiny.context())
    short_BLD, _ = run(module, x_BLD[:, :TOP_K], tiny.context(length=TOP_K))
    torch.testing.assert_close(long_BLD[:, :TOP_K], short_BLD, rtol=0, atol=1e-12)
    assert (
        long_BLD[:, TOP_K:]
        - run(layer("model.attention.top_k=8"), x_BLD, tiny.context())[0][:, TOP_K:]
    ).abs().max() > 1e-3


# ---- the choice


def test_the_highest_are_chosen_and_of_equal_scores_the_lower_positions() -> None:
    draw = torch.Generator().manual_seed(0)
    for k in (1, 3, 6, 7, 9):
        scores_XS = torch.randint(-2, 3, (50, 7), generator=draw).float()
        scores_XS[:, 5] = -torch.inf
        mask_XS = highest(scores_XS, k)
        for row, mask in zip(scores_XS.tolist(), mask_XS, strict=True):
            assert mask.nonzero().flatten().tolist() == best(row, range(7), k)


def test_rows_of_nothing_but_infinities_or_nan_are_no_error() -> None:
    none = torch.full((1, 5), -torch.inf)
    assert highest(none, 2).tolist() == [[True, True, False, False, False]]
    assert not highest(torch.full((1, 5), torch.nan), 2).any()


def test_the_choice_is_an_operator_with_a_meta_kernel() -> None:
    torch.library.opcheck(highest, (torch.randn(2, 3, 5), 2))
    assert highest(torch.empty(2, 3, device="meta"), 1).dtype == torch.bool


# ---- recomputation, micro-batches, compilation


def total(model: Any, given: SequenceContext) -> Tensor:
    """The objective of a step of one micro-batch, as in training."""
    ledger = Ledger.of(model)
    window = Window.of(model, ledger, [given])
    return objective(model, ledger, model(given), window, tiny.START, WindowTotals())


@pytest.mark.parametrize("more", first_by_default([WARMUP, SPARSE]))
def test_recomputation_changes_no_bit_and_chooses_once(more: tuple[str, ...]) -> None:
    """The multi-token modules have indexers too; `topk` runs for experts alone where nothing is hidden in operators."""
    found = []
    for recompute in ((), (RECOMPUTE,)):
        model = tiny.build(*tiny.MTP, *more, *recompute)
        with Ops() as forward:
            loss = total(model, tiny.context())
        with Ops() as backward:
            gradients = tiny.backward(model, loss)
        found.append(gradients)
        assert forward.counts["highest"] == 5
        assert "highest" not in backward.counts
    tiny.assert_equal(*found)
    assert found[0]["heads.mtp.depths.0.block.attention.indexer.q.weight"].any()


def test_a_choice_that_would_now_fall_otherwise_is_kept() -> None:
    """The key's bias changes between forward and backward: the gradients are those of the first choice."""
    found = []
    for recompute in ((), (RECOMPUTE,)):
        model = tiny.build(*SPARSE, *recompute)
        losses = model(tiny.context())
        loss = losses.heads["next_token"].terms["next_token"]
        with torch.no_grad():
            for block in model.blocks:
                block.attention.indexer.k_norm.bias.data.mul_(-3)
        found.append(tiny.backward(model, loss))
    tiny.assert_equal(*found)


def test_the_gradient_does_not_depend_on_the_split_into_micro_batches() -> None:
    model = tiny.build(*tiny.MTP, *SPARSE)
    valid_BL = torch.arange(8) < torch.tensor([[8], [3], [0], [6]])
    whole = tiny.context(4, valid_BL=valid_BL)
    ledger, found = Ledger.of(model), []
    for cuts in ([(0, 4)], [(0, 1), (1, 3), (3, 4)]):
        contexts = [tiny.part(whole, slice(*cut)) for cut in cuts]
        window, totals = Window.of(model, ledger, contexts), WindowTotals()
        model.zero_grad()
        for context in contexts:
            objective(model, ledger, model(context), window, tiny.START, totals).backward()
        found.append(tiny.gradients(model))
    tiny.assert_close(*found, 1e-10)


@pytest.mark.full
def test_one_graph_serves_both_stages() -> None:
    """Compiled without a break, forward and backward; the step after the warm-up compiles nothing."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    plain, model = tiny.build(*WARMUP), tiny.build(*WARMUP)
    counter = CompileCounterWithBackend("aot_eager")
    block = model.blocks[0]
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=False)
    for step in range(3, 8):
        progress = Progress(step, step, 10, 10)
        context, found = tiny.context(step=step), []
        for one, forward in ((block, compiled), (plain.blocks[0], plain.blocks[0])):
            one.attention.on_step_start(progress)
            x_BLD = states().requires_grad_()
            y_BLD, records = forward(x_BLD, context)
            loss = y_BLD.square().sum() + records["attention"].terms["indexer"]
            found.append({"y": y_BLD.detach(), **gradients_of(one, x_BLD, loss)})
        tiny.assert_close(*found, 1e-11)
    assert counter.frame_count <= 2, (
        "the number of the step is a constant once, and then a variable"
    )


def test_index_scores_keep_their_arguments_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of heads; in chunks of one head the results are the same up to rounding."""
    draw = torch.Generator().manual_seed(0)
    q_BLHX = torch.randn(2, 9, 5, 6, dtype=torch.float64, generator=draw).requires_grad_()
    k_BSX = torch.randn(2, 9, 6, dtype=torch.float64, generator=draw).requires_grad_()
    w_BLH = torch.randn(2, 9, 5, dtype=torch.float64, generator=draw).requires_grad_()
    kept = saved_bytes(lambda: scores.index_scores(q_BLHX, k_BSX, w_BLH), torch.nn.Module())
    assert kept == 8 * (q_BLHX.numel() + k_BSX.numel() + w_BLH.numel())
    found = []
    for at_once in (scores.AT_ONCE, 1, 2 * 81):
        monkeypatch.setattr(scores, "AT_ONCE", at_once)
        value = scores.index_scores(q_BLHX, k_BSX, w_BLH)
        found.append([value, *torch.autograd.grad(value.sin().sum(), (q_BLHX, k_BSX, w_BLH))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(scores.index_scores, (q_BLHX, k_BSX, w_BLH), fast_mode=True)
    q_BSHX = torch.randn(2, 9, 5, 6, dtype=torch.float64, generator=draw)
    mask_BLS = torch.ones(9, 9, dtype=torch.bool).tril()[None]
    by_chunk = []
    for at_once in (1 << 24, 1):
        monkeypatch.setattr(scores, "AT_ONCE", at_once)
        by_chunk.append(scores.mean_attention(q_BLHX, q_BSHX, 0.3, mask_BLS))
    torch.testing.assert_close(*by_chunk, rtol=1e-12, atol=1e-12)


# ---- the warm-up


def test_the_stage_is_that_of_the_step_whatever_was_before() -> None:
    module = layer("model.attention.warmup_steps=4")
    for step, dense in ((1, True), (4, True), (5, False), (4, True), (9, False)):
        module.on_step_start(Progress(step, step, 10, 10))
        assert module.dense is not None
        assert bool(module.dense) is dense
    assert layer().dense is None
    assert "dense" not in layer().state_dict()
    assert "dense" in module.state_dict()


def test_the_indexers_of_all_layers_learn_alone_in_the_warm_up_of_a_frozen_model() -> None:
    model = tiny.build(*tiny.MTP, *WARMUP)
    alone = learning_alone(model, Progress(4, 4, 10, 10))
    assert alone == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert any(name.startswith("heads.mtp") for name in alone)
    assert learning_alone(model, Progress(5, 5, 10, 10)) is None
    trained = tiny.build(*WARMUP, "model.attention.warmup_main=trained")
    assert learning_alone(trained, Progress(1, 1, 10, 10)) is None


def test_the_share_of_attention_that_would_be_selected_is_measured_in_the_warm_up() -> None:
    module = layer("model.attention.warmup_steps=4")
    context, x_BLD = tiny.context(), states()
    _, record = run(module, x_BLD, context)
    metric = record.metrics["selected_share"]
    assert int(metric.count) == 2 * (8 - TOP_K)
    assert 0.3 < float(metric.value()) < 1
    module.on_step_start(Progress(5, 5, 10, 10))
    _, record = run(module, x_BLD, context)
    assert float(record.metrics["selected_share"].value()) == pytest.approx(1)


# ---- decoding


def test_decoding_keeps_the_stage() -> None:
    for step in (1, 9):
        module = layer("model.attention.warmup_steps=4").eval()
        module.on_step_start(Progress(step, step, 10, 10))
        x_BLD, context = states(), tiny.context()
        cache = module.new_cache(2, 8)
        with torch.no_grad():
            full_BLD, _ = run(module, x_BLD, context)
            parts = []
            for start, end in ((0, 4), (4, 5), (5, 8)):
                new = SequenceContext.of(
                    context.tokens_BL[:, start:end], start=start, recorded=False
                )
                parts.append(module(x_BLD[:, start:end], new, cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), full_BLD, rtol=0, atol=1e-12)


# ---- precision


@pytest.mark.parametrize("high", [False, True])
def test_the_indexers_products_have_roles_that_a_precision_treats(high: bool) -> None:
    """FP8 by default; `precision.high` may name single roles, as the released weights keep `weights_proj`."""
    names = (
        "[embedding, head, router, norm, indexer.weights]"
        if high
        else "[embedding, head, router, norm]"
    )
    model = tiny.build(*SPARSE, f"precision={{name: fp8_emulated, high: {names}}}")
    total(model, tiny.context()).backward()
    paths = model.kernels_used().table()
    assert paths["indexer.q"] == paths["indexer.k"] == paths["attention.q_up"]
    assert (paths["indexer.weights"] == paths["attention.q_up"]) is not high
    gradient = model.blocks[0].attention.indexer.weights.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()


# ---- costs and settings

V32 = (
    "model.attention={name: sparse, heads: 128, q_rank: 1536, kv_rank: 512, nope_dim: 128, rope_dim: 64, "
    "value_dim: 128}"
)


def test_costs_of_deepseek_v32s_layer_at_128k() -> None:
    """Scores and outputs of 2,048 positions instead of half of 131,072, and an indexer of 64 heads of 128."""
    module = copy.copy(tiny_v32().blocks[0].attention)
    module.length = 131072
    costs = module.costs()
    attended = 2048 - 2048**2 / (2 * 131072)
    assert costs.attention_flops == 2 * 128 * 320 * attended + 2 * 64 * 128 * 65536
    assert costs.cache == 512 + 64 + 128
    module.length = 1024
    dense = 2 * 128 * 320 * 512
    assert module.costs().attention_flops == dense + 2 * 64 * 128 * 512


def tiny_v32() -> Any:
    """A model with the released widths of attention, on the meta device."""
    return core.build(tiny.compose(V32), device="meta")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("q_rank=null", "model.attention.q_rank = null: must be a width: the indexer's queries"),
        ("index_heads=0", "model.attention.index_heads = 0: must be at least 1"),
        ("top_k=0", "model.attention.top_k = 0: must be at least 1"),
        ("index_dim=2", "model.attention.index_dim = 2: must be at least rope_dim = 4"),
        ("warmup_steps=-1", "model.attention.warmup_steps = -1: must be at least 0"),
        ("weight=-1", "model.attention.weight = -1.*: must be at least 0"),
        ("weight=.inf", "model.attention.weight = inf: must be finite"),
        ("weight=.nan", "model.attention.weight = nan: must be"),
        ("warmup_main=thawed", "model.attention.warmup_main = .*thawed"),
    ],
)
def test_settings_out_of_range_are_errors(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        tiny.compose(*SPARSE, f"model.attention.{override}")
