"""Hyper-connections against loops straight from the paper, and what they promise of a model."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from saved_tensors import saved_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.analysis.describe import document_of
from core.assemble import build, compile_parts, make
from core.contracts.errors import UserError
from core.model.language_model import LanguageModel
from core.model.parameters import named_parameters
from plugins.hyper_connections.sinkhorn import doubly_stochastic

from . import tiny

ADD = "model.residual={name: add}"
STREAMS = "model.heads.mtp={name: mtp, depth: 2, weight: 0.3, reads: streams}"


def residual(**settings: Any) -> str:
    """The override that gives the tiny model hyper-connections."""
    listed = ", ".join(
        f"{key}: {value}" for key, value in {"name": "hyper_connections", **settings}.items()
    )
    return f"model.residual={{{listed}}}"


# ---- the maps, number by number (mHC, arXiv 2512.24880, equations 3 and 7 to 9)


def slow_maps(part: Any, states_ND: Sequence[Sequence[float]], eps: float) -> list[Any]:
    """`pre`, `post` and the matrix H_res of one position, as lists of Python's floats."""
    n = len(states_ND)
    numbers = [value for state in states_ND for value in state]
    rms = math.sqrt(math.fsum(value**2 for value in numbers) / len(numbers) + part.norm_eps)
    normed = [value / rms for value in numbers]
    weights = part.projection.tolist()
    base = part.base.tolist()
    scales = [*part.scale.tolist()]

    def logit(row: int, of: int) -> float:
        product = math.fsum(w * v for w, v in zip(weights[row], normed, strict=True))
        return scales[of] * product + base[row]

    pre = [1 / (1 + math.exp(-logit(i, 0))) + eps for i in range(n)]
    if len(scales) == 1:
        return [pre]
    post = [2 / (1 + math.exp(-logit(n + i, 1))) for i in range(n)]
    # The weights hold the transpose of the paper's matrix, as the released ones do.
    matrix = [[math.exp(logit(2 * n + n * j + i, 2)) for j in range(n)] for i in range(n)]
    for _ in range(20):
        columns = [math.fsum(matrix[i][j] for i in range(n)) for j in range(n)]
        matrix = [[matrix[i][j] / columns[j] for j in range(n)] for i in range(n)]
        rows = [math.fsum(matrix[i]) for i in range(n)]
        matrix = [[matrix[i][j] / rows[i] for j in range(n)] for i in range(n)]
    return [pre, post, matrix]


def mixture(weights: Sequence[float], states_ND: Sequence[Sequence[float]]) -> list[float]:
    """The sum of states, each times a weight."""
    width = len(states_ND[0])
    pairs = list(zip(weights, states_ND, strict=True))
    return [math.fsum(w * state[d] for w, state in pairs) for d in range(width)]


def random_streams(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random streams; each is larger than the one before it, so that no two can be exchanged unnoticed."""
    draw = torch.Generator().manual_seed(3)
    stream = torch.randn(*shape, dtype=torch.float64, generator=draw)
    return (stream * torch.arange(1, shape[2] + 1)[:, None]).to(dtype)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_maps_and_sums_are_the_papers(streams: int) -> None:
    """With an epsilon of 1e-13 the source's normalisation is the paper's: 20 times columns, then rows, of exp."""
    model = tiny.build(residual(streams=streams, eps=1e-13))
    stream = random_streams(2, 3, streams, 32)
    output_BLD = random_streams(2, 3, 1, 32)[:, :, 0]
    part: Any = model.blocks[1].ffn_residual
    found = {
        "read": part.read(stream),
        "write": part.write(stream, output_BLD),
        "collapse": model.residual.collapse(stream),
    }
    for row, position in ((0, 0), (1, 2)):
        states_ND = stream[row, position].tolist()
        pre, post, matrix = slow_maps(part, states_ND, 1e-13)
        (own_pre,) = slow_maps(model.residual, states_ND, 1e-13)
        output_D = output_BLD[row, position].tolist()
        written = []
        for i in range(streams):
            mixed = mixture(matrix[i], states_ND)
            written.append([m + post[i] * f for m, f in zip(mixed, output_D, strict=True)])
        expected = {
            "read": mixture(pre, states_ND),
            "write": written,
            "collapse": mixture(own_pre, states_ND),
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name][row, position],
                torch.tensor(value, dtype=torch.float64),
                rtol=1e-9,
                atol=1e-9,
                msg=name,
            )


def test_blocks_read_and_write_the_streams_as_they_say() -> None:
    """The whole model once more from its parts; the maps are those that the loops have checked."""
    model = tiny.build(residual()).eval()
    given = tiny.context(length=8)
    embedded_BLD = model.embedding(given.tokens_BL)
    stream = torch.stack([embedded_BLD] * 4, dim=2)
    for block in model.blocks:
        for norm, layer, part in (
            (block.attention_norm, block.attention, block.attention_residual),
            (block.ffn_norm, block.ffn, block.ffn_residual),
        ):
            found = layer(norm(part.read(stream)), given)
            output_BLD = found[0] if isinstance(found, tuple) else found
            stream = part.write(stream, output_BLD)
    expected = model.norm(model.residual.collapse(stream))
    torch.testing.assert_close(model.hidden(given)[0], expected, rtol=1e-12, atol=1e-12)


# ---- Sinkhorn


@pytest.mark.parametrize("rounds", [1, 2, 20])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_gradient_of_the_normalisation_is_that_of_its_rounds(n: int, rounds: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, n, n, dtype=torch.float64, generator=draw).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: doubly_stochastic(x, rounds, 1e-6), logits)


def test_rows_and_columns_sum_to_1_after_20_rounds() -> None:
    draw = torch.Generator().manual_seed(0)
    found = doubly_stochastic(torch.randn(500, 4, 4, generator=draw), 20, 1e-6)
    assert found.min() > 0
    assert (found.sum(dim=-2) - 1).abs().max() < 3e-6
    assert (found.sum(dim=-1) - 1).abs().max() < 2e-4


@pytest.mark.full
def test_a_compiler_sees_the_same_normalisation() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 4, 4, dtype=torch.float64, generator=draw).requires_grad_()
    compiled = torch.compile(doubly_stochastic, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, doubly_stochastic):
        matrices = function(logits, 20, 1e-6)
        (gradient,) = torch.autograd.grad(matrices.square().sum(), logits)
        results.append((matrices, gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# ---- the start


def initial(*overrides: str) -> LanguageModel:
    """The tiny model with its initial weights."""
    model: LanguageModel = build(tiny.compose(*overrides))
    return model


@pytest.mark.parametrize("head", [tiny.MTP[0], STREAMS], ids=["collapsed", "streams"])
@pytest.mark.parametrize("streams", [2, 4])
def test_at_first_the_model_and_its_gradients_are_those_of_add(streams: int, head: str) -> None:
    """Up to the epsilon of the normalisation, which here is as small as rounding."""
    given = tiny.context(length=8)
    plain, wide = initial(ADD, head), initial(residual(streams=streams, eps=1e-13), head)
    torch.testing.assert_close(
        wide.hidden(given)[0], plain.hidden(given)[0], rtol=1e-10, atol=1e-10
    )
    for model in (plain, wide):
        tiny.see(model, given).total().backward()
    theirs = dict(wide.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            theirs[name].grad, parameter.grad, rtol=1e-8, atol=1e-10, msg=name
        )


def test_with_the_default_epsilon_the_start_is_that_of_add_to_1e_4() -> None:
    given = tiny.context(length=8)
    wide = initial(residual()).hidden(given)[0]
    assert (wide - initial(ADD).hidden(given)[0]).abs().max() < 1e-4


def test_a_single_stream_starts_as_add_up_to_the_epsilon_of_norms() -> None:
    """It is read as half of itself, which the norm after it takes away."""
    given = tiny.context(length=8)
    settings = ("model.norm_eps=1e-14",)
    wide = initial(residual(streams=1, eps=1e-13), *settings).hidden(given)[0]
    plain = initial(ADD, *settings).hidden(given)[0]
    torch.testing.assert_close(wide, plain, rtol=1e-9, atol=1e-9)


def test_zeros_start_with_the_maps_of_zero_biases() -> None:
    """pre 1/2, post 1 and comb 1/4 each, where the projection counts for nothing."""
    model = initial(residual(start="zeros"))
    stream = random_streams(2, 3, 4, 32)
    part: Any = model.blocks[0].attention_residual
    torch.testing.assert_close(part.read(stream), stream.sum(dim=2) / 2, rtol=1e-5, atol=1e-4)
    written = part.write(stream, torch.ones(2, 3, 32, dtype=torch.float64))
    expected = (stream.mean(dim=2, keepdim=True) + 1).expand_as(stream)
    torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-4)


def test_training_parts_the_streams() -> None:
    """Equal streams stay equal only until the first step: the gradient of the scales is not zero."""
    model = initial(residual())
    given = tiny.context(length=8)

    def apart() -> float:
        stream = model.states(given).stream.detach()
        return float((stream - stream.mean(dim=2, keepdim=True)).abs().max())

    assert apart() < 1e-5
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        tiny.see(model, given).total().backward()
        optimizer.step()
    assert apart() > 1e-3


def test_maps_are_drawn_by_their_own_address() -> None:
    """No other initial weight depends on the residual, and no two projections are the same."""
    plain, wide = initial(ADD), initial(residual())
    theirs = {name: value.detach() for name, value in wide.named_parameters()}
    assert all(torch.equal(theirs[name], value) for name, value in plain.named_parameters())
    drawn = [value for name, value in theirs.items() if name.endswith("residual.projection")]
    assert len(drawn) == 2 * 3 + 1
    assert len({float(value.flatten()[0]) for value in drawn}) == len(drawn)
    assert 0.19 < float(torch.cat([value.flatten() for value in drawn]).std()) < 0.21


# ---- formats, recomputation, compilation


def test_a_bf16_stream_is_read_and_written_with_maps_in_fp32() -> None:
    """One rounding of the result, and no other: half a unit in the last place."""
    model = tiny.build(residual(), "precision.name=bf16")
    exact = tiny.build(residual())
    exact.load_state_dict(model.state_dict())
    stream = random_streams(2, 3, 4, 32, dtype=torch.bfloat16)
    output_BLD = random_streams(2, 3, 1, 32, dtype=torch.bfloat16)[:, :, 0]
    pairs = []
    for one, dtype in ((model, torch.bfloat16), (exact, torch.float64)):
        part: Any = one.blocks[0].ffn_residual
        given = stream.to(dtype)
        pairs.append((part.read(given), part.write(given, output_BLD.to(dtype))))
    for low, high in zip(*pairs, strict=True):
        assert low.dtype == torch.bfloat16
        rounded = (low.double() - high).abs() <= high.abs() * 2**-8 + 1e-4
        assert rounded.all()
    assert all(p.dtype == torch.float32 for p in model.residual.parameters())


def test_no_precision_quantises_the_maps() -> None:
    """In emulated FP8 the maps of a layer are those of fp32, bit for bit."""
    stream = random_streams(2, 3, 4, 32, dtype=torch.float32)
    found = []
    for name in ("fp32", "fp8_emulated"):
        model = tiny.build(residual(), f"precision.name={name}", "model.dim=32")
        part: Any = model.blocks[0].ffn_residual
        found.append((part.read(stream), part.write(stream, stream[:, :, 0])))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_recomputation_changes_no_bit() -> None:
    given = tiny.context(length=8)
    found = []
    for blocks in ("[]", "[dense, moe]"):
        model = tiny.build(residual(), STREAMS, f"recompute.blocks={blocks}").train()
        tiny.see(model, given).total().backward()
        found.append(tiny.gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.full
def test_compiled_blocks_and_heads_compute_the_same() -> None:
    given = tiny.context(length=8)
    model = tiny.build(residual(rounds=3), STREAMS)
    before = tiny.see(model, given).total()
    compile_parts(model, backend="aot_eager")
    torch.testing.assert_close(tiny.see(model, given).total(), before, rtol=1e-12, atol=0)


# ---- the multi-token module


def test_a_multi_token_module_joins_every_stream_with_the_embedding() -> None:
    """Depth 1 from its parts: norms and projection stream by stream, the block, its own collapse."""
    model = tiny.build(residual(), STREAMS).train()
    given = tiny.context(length=8)
    outputs: list[Any] = []
    depths: Any = model.heads["mtp"].depths
    for depth in depths:
        depth.register_forward_hook(lambda _, __, output: outputs.append(output))
    model(given)
    stream = model.states(given).stream
    for k, (depth, output) in enumerate(zip(depths, outputs, strict=True), start=1):
        inner = model.contexts(given)[f"heads.mtp.depths.{k - 1}.block"]
        embedding_BLD = depth.embedding_norm(model.embedding(inner.tokens_BL))
        stream = stream[:, : 8 - k]
        joined = []
        for number in range(4):
            state_BLD = depth.hidden_norm(stream[:, :, number])
            joined.append(depth.projection(torch.cat([embedding_BLD, state_BLD], dim=-1)))
        stream, _ = depth.block(torch.stack(joined, dim=2), inner)
        expected_BLD = depth.norm(depth.residual.collapse(stream))
        torch.testing.assert_close(output.normed_BLD, expected_BLD, rtol=1e-12, atol=1e-12)


# ---- sizes and costs


def test_costs_are_the_weights_and_the_flops_of_the_sums() -> None:
    model = tiny.build(residual())
    stream = random_streams(1, 5, 4, 32)
    part: Any = model.blocks[0].ffn_residual
    weights = 24 * 128 + 24 + 3
    assert part.costs().active == weights == sum(p.numel() for p in part.parameters())
    with FlopCounterMode(display=False) as counter:
        part.write(stream, part.read(stream))
    outer = 2 * 4 * 32  # post times the output, which is no matrix product
    forward = 2 * (weights - 24 - 3) + part.costs().other_flops
    assert counter.get_total_flops() / 5 == forward - outer
    assert model.residual.costs().active == 4 * 128 + 4 + 1


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_layer_keeps_the_activations_that_describe_counts(name: str) -> None:
    """What autograd saves, without norms of streams and the like, which are as narrow as a single number."""
    tokens, model = 16, tiny.build(residual(), f"precision.name={name}")
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    part: Any = model.blocks[0].ffn_residual
    stream = random_streams(1, tokens, 4, 32, dtype=dtype).requires_grad_()
    output_BLD = random_streams(1, tokens, 1, 32, dtype=dtype)[:, :, 0].requires_grad_()

    def both() -> list[Tensor]:
        return [part.read(stream), part.write(stream, output_BLD)]

    counted = tokens * part.activation_bytes(dtype.itemsize, 4)
    assert saved_bytes(both, part) == pytest.approx(counted, rel=0.25)


def test_describe_counts_every_stream() -> None:
    recipes = {streams: tiny.compose(residual(streams=streams), STREAMS) for streams in (1, 4)}
    documents = {streams: document_of(recipe) for streams, recipe in recipes.items()}
    memory = {streams: found["memory_bytes"] for streams, found in documents.items()}
    assert memory[4]["residual_stream"] == 4 * memory[1]["residual_stream"]
    plain = document_of(tiny.compose(ADD, STREAMS))
    added = documents[4]["params_total"] - plain["params_total"]
    assert added == 6 * (24 * 128 + 24 + 3) + 4 * 128 + 4 + 1
    more = documents[4]["flops_per_token_full"] - documents[4]["flops_per_token"]
    assert more == plain["flops_per_token_full"] - plain["flops_per_token"]
    assert "residual" not in documents[4]["precision"]


def test_the_rows_of_components_add_up_to_the_model() -> None:
    document = document_of(tiny.compose(residual(), STREAMS))
    rows = {row["component"]: row for row in document["components"]}
    assert rows["residual"]["parameters"] == 6 * (24 * 128 + 24 + 3) + 4 * 128 + 4 + 1
    assert rows["residual"]["active"] == rows["residual"]["parameters"]
    assert "other" not in rows
    flops = sum(row["flops_per_token"] for row in rows.values())
    assert flops == pytest.approx(document["flops_per_token"], rel=1e-12)
    parameters = sum(row["parameters"] for row in rows.values())
    assert parameters == document["params_total"] + document["params_mtp"]


def test_weights_are_matrices_and_vectors_of_the_role_residual() -> None:
    """Optimizers see a matrix and two vectors for each layer, of which AdamW decays the matrix alone."""
    found = {named.name: named for named in named_parameters(tiny.build(residual()))}
    kinds = {"projection": "matrix", "base": "vector", "scale": "vector"}
    for part in ("residual", "blocks.1.attention_residual", "blocks.1.ffn_residual"):
        for name, kind in kinds.items():
            named = found[f"{part}.{name}"]
            assert (named.role, named.kind) == ("residual", kind)


def test_the_projection_is_muons_unless_adamw_gets_the_role() -> None:
    """Vectors are AdamW's in both cases; without such a residual the role is an error."""
    muon = "optimizer={name: muon, lr: 0.001}"
    named = "optimizer.adamw.roles=[embedding, head, residual]"
    path = "blocks.1.ffn_residual."
    for overrides, expected in (((muon,), True), ((muon, named), False)):
        recipe = tiny.compose(residual(), *overrides)
        optimizer = make(recipe.optimizer)
        is_muons = {}
        for one in named_parameters(build(recipe, device="meta")):
            is_muons[one.name] = optimizer.is_muons(one)
        assert is_muons[f"{path}projection"] == is_muons["residual.projection"] == expected
        assert not is_muons[f"{path}base"]
        assert not is_muons[f"{path}scale"]
    with pytest.raises(UserError, match="'residual' is not a role"):
        tiny.compose(muon, named)


# ---- mistakes


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("streams", "0", "must be from 1 to 64"),
        ("streams", "65", "must be from 1 to 64"),
        ("rounds", "0", "must be from 1 to 1000"),
        ("rounds", "1001", "must be from 1 to 1000"),
        ("eps", "0", "must be more than 0 and at most 0.001"),
        ("eps", "-1.0e-6", "must be more than 0 and at most 0.001"),
        ("eps", "0.01", "must be more than 0 and at most 0.001"),
        ("eps", ".nan", "must be finite"),
        ("eps", ".inf", "must be finite"),
        ("scale", "-0.1", "must be from 0 to 1000"),
        ("scale", "1.0e+39", "must be from 0 to 1000"),
        ("scale", ".inf", "must be finite"),
        ("scale", ".nan", "must be finite"),
        ("start", "ones", "add"),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.compose(residual(**{key: value}))
    assert f"model.residual.{key}" in str(caught.value)
    assert why in str(caught.value)
