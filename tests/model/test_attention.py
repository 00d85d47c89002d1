"""Attention: rotary layouts, YaRN, causality, documents, the cache, and each variant against the reference."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import Reference, Yarn, frequencies, mscale, yarn_range
from torch import Tensor

from core.contracts.attention import Attention
from core.contracts.build import Rope
from core.model import attend
from core.model.language_model import LanguageModel
from core.model.rope import correction_range, rope_table, rotate, softmax_scale

from . import tiny

DIM = 32
V3_YARN = Yarn(factor=40, original_length=4096)
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 2, 2]])
every_attention = pytest.mark.parametrize("name", tiny.ATTENTIONS)


def dense(name: str) -> LanguageModel:
    """A model of dense blocks only."""
    return tiny.build(*tiny.ATTENTIONS[name], *tiny.DENSE)


def layer(name: str) -> Attention:
    """The first attention of that model."""
    found = dense(name).get_submodule("blocks.0.attention")
    assert isinstance(found, Attention)
    return found


def inputs(length: int = 6) -> Tensor:
    return torch.randn(
        2, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def half_layout(y: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Rotation of (x_j, x_{j + R/2}), as the Llama layout does it."""
    angles = position * torch.tensor(frequencies(len(y), theta, None), dtype=torch.float64)
    first, second = y.chunk(2)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    )


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 2])
def test_rotations_read_vectors_from_anywhere_in_a_projection(start: int, length: int) -> None:
    """A key behind a latent of odd width begins at an odd place; an axis of length 1 has any stride."""
    projected = torch.randn(1, length, start + 8, dtype=torch.float64)
    key = projected[..., start:]
    positions = torch.arange(length)[None]
    rope = Rope(1e4, 4096)
    own = rotate(key.clone()[:, :, None], rope, positions)
    assert torch.equal(rotate(key[:, :, None], rope, positions), own)


def test_A2_interleaved_scores_equal_half_layout_scores_with_permuted_weights() -> None:
    """Rows 2j and 2j + 1 go to j and j + R/2."""
    generator = torch.Generator().manual_seed(0)
    wq, wk = torch.randn(2, 8, DIM, dtype=torch.float64, generator=generator)
    x, y = torch.randn(2, DIM, dtype=torch.float64, generator=generator)
    half_q, half_k = (w.view(4, 2, DIM).transpose(0, 1).reshape(8, DIM) for w in (wq, wk))
    for p, q in ((0, 0), (5, 2), (1000, 37)):
        turned = [
            rotate(v.view(1, 1, 1, 8), Rope(1e4, 4096), torch.tensor([[at]]))
            for v, at in ((wq @ x, p), (wk @ y, q))
        ]
        halves = half_layout(half_q @ x, p) @ half_layout(half_k @ y, q)
        torch.testing.assert_close((turned[0] * turned[1]).sum(), halves, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(turned[0].flatten(), half_layout(wq @ x, p)) or p == 0


def test_rotated_scores_depend_on_the_distance_only() -> None:
    x, y = torch.randn(
        2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    scores = [
        (
            rotate(x, Rope(1e4, 4096), torch.tensor([[7 + s]]))
            * rotate(y, Rope(1e4, 4096), torch.tensor([[3 + s]]))
        ).sum()
        for s in (0, 1, 500)
    ]
    assert max(scores) - min(scores) < 1e-12


def test_A3_yarn_range_of_deepseek_v3() -> None:
    assert correction_range(64, 10000.0, V3_YARN) == (10, 23)
    assert yarn_range(64, 10000.0, V3_YARN) == (10, 23)


@pytest.mark.parametrize(("coefficient", "expected"), [(1.0, 0.135234), (0.707, 0.114721)])
def test_A3_softmax_scale_with_yarn(coefficient: float, expected: float) -> None:
    """192^-0.5 times the squared temperature of all dimensions; `mscale` has no part in it."""
    yarn = Yarn(factor=40, original_length=4096, mscale=0.3, mscale_all_dim=coefficient)
    assert softmax_scale(192, Rope(1e4, 163840, yarn)) == pytest.approx(expected, abs=5e-7)


def test_A3_softmax_scale_without_yarn_and_below_its_reach() -> None:
    assert softmax_scale(192, Rope(1e4, 4096)) == pytest.approx(0.0721688, abs=5e-8)
    assert softmax_scale(192, Rope(1e4, 4096, Yarn(factor=1, original_length=4096))) == 192**-0.5


def test_A3_attention_of_deepseek_v3s_widths_uses_that_scale() -> None:
    widths = ("heads=2", "nope_dim=128", "rope_dim=64")
    recipe = [*(f"model.attention.{w}" for w in widths), *tiny.DENSE]
    yarn = "model.rope={max_length: 163840, yarn: {factor: 40}}"
    assert tiny.build(*recipe).get_submodule("blocks.0.attention").scale == 192**-0.5
    assert tiny.build(*recipe, yarn).get_submodule("blocks.0.attention").scale == pytest.approx(
        0.135234, abs=5e-7
    )


@pytest.mark.parametrize(
    "yarn",
    [
        V3_YARN,
        Yarn(factor=40, original_length=4096, mscale=0.707, mscale_all_dim=1.0),
        Yarn(
            factor=4, original_length=64, beta_fast=8, beta_slow=2, mscale=1.0, mscale_all_dim=0.5
        ),
        Yarn(factor=16, original_length=8, beta_fast=8, beta_slow=1),
    ],
)
@pytest.mark.parametrize("dim", [64, 8])
def test_A3_full_yarn_table(yarn: Yarn, dim: int) -> None:
    """Every angle, and the ratio of the two temperatures on cos and sin alike."""
    positions = [0, 1, 7, 4096, 163839]
    cos, sin = rope_table(Rope(1e4, 163840, yarn), dim, torch.tensor(positions), torch.float64)
    ratio = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    for row, position in enumerate(positions):
        for j, frequency in enumerate(frequencies(dim, 1e4, yarn)):
            assert cos[row, j].item() == pytest.approx(
                ratio * math.cos(position * frequency), abs=1e-9
            )
            assert sin[row, j].item() == pytest.approx(
                ratio * math.sin(position * frequency), abs=1e-9
            )


def test_angles_are_taken_in_fp64_whatever_the_format() -> None:
    """An angle of 163,839 rad would be off by 0.008 in fp32."""
    positions = torch.tensor([1, 4097, 163839])
    wide, narrow = (
        rope_table(Rope(1e4, 163840), 64, positions, d) for d in (torch.float64, torch.float32)
    )
    for w, n in zip(wide, narrow, strict=True):
        assert torch.equal(w.to(torch.float32), n)


@pytest.mark.parametrize(("name", "kv_heads"), [("mha", 4), ("gqa", 2), ("mqa", 1)])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_head_attention_equals_the_reference(
    name: str, kv_heads: int, documents: Tensor | None
) -> None:
    """Query head i reads key-value head i * kv_heads / heads."""
    model, x_BLD = dense(name), inputs()
    given = tiny.context(2, 6, documents_BM=documents)
    reference = Reference(model.state_dict(), tiny.settings(tiny.compose(*tiny.ATTENTIONS[name])))
    rows = [[0] * 6, [0] * 6] if documents is None else documents[:, :6].tolist()
    expected = [
        torch.stack(reference.head_attention("blocks.0.attention", list(x_LD), row, kv_heads))
        for x_LD, row in zip(x_BLD, rows, strict=True)
    ]
    own = model.get_submodule("blocks.0.attention")(x_BLD, given)
    torch.testing.assert_close(own, torch.stack(expected), rtol=1e-11, atol=1e-11)


@every_attention
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_attends_to_exactly_the_causal_rows_of_the_document(
    name: str, documents: Tensor | None
) -> None:
    """The pattern of non-zero derivatives d out_i / d x_j is the mask itself: exact zeros elsewhere."""
    attention, x_BLD, given = (
        layer(name),
        inputs().requires_grad_(),
        tiny.context(2, 6, documents_BM=documents),
    )
    y_BLD = attention(x_BLD, given)
    docs = torch.zeros(2, 6) if documents is None else documents[:, :6]
    expected = torch.ones(6, 6).tril().bool() & (docs[:, :, None] == docs[:, None, :])
    for i in range(6):
        (slope,) = torch.autograd.grad(y_BLD[:, i].square().sum(), x_BLD, retain_graph=True)
        assert torch.equal((slope != 0).any(dim=-1), expected[:, i]), f"row {i}"


def decoded(model: LanguageModel, tokens_BL: Tensor, chunks: list[int]) -> Tensor:
    """Logits of tokens that come in chunks of these sizes."""
    caches = model.new_caches(*tokens_BL.shape)
    return torch.cat(
        [model.decode(chunk, caches) for chunk in tokens_BL.split(chunks, dim=1)], dim=1
    )


@every_attention
@pytest.mark.parametrize("chunks", [[1] * 8, [3, 3, 2], [5, 1, 1, 1], [8]])
def test_cached_decoding_equals_the_full_forward(name: str, chunks: list[int]) -> None:
    model, tokens_BL = tiny.build(*tiny.ATTENTIONS[name]), tiny.context().tokens_BL
    with torch.no_grad():
        full = model.logits(tokens_BL)
        torch.testing.assert_close(decoded(model, tokens_BL, chunks), full, rtol=1e-12, atol=1e-12)


@every_attention
def test_the_cache_keeps_what_costs_declare(name: str) -> None:
    """The formula by hand; that a filled cache has these bytes is in the conformance kit."""
    by_hand = {"mla": 16 + 4, "mla without query latent": 16 + 4, "mha": 64, "gqa": 32, "mqa": 16}
    assert layer(name).costs().cache == by_hand[name]


def test_decoding_with_recomputation_switched_on_uses_the_cache() -> None:
    """Recomputed blocks are for training; a cache must be honoured with gradients enabled too."""
    model, tokens_BL = tiny.build("recompute.blocks=[dense, moe]"), tiny.context().tokens_BL
    full = model.logits(tokens_BL)
    torch.testing.assert_close(decoded(model, tokens_BL, [1] * 8), full, rtol=1e-12, atol=1e-12)


def test_A1_latent_cache_serves_absorbed_attention() -> None:
    """Report, eq. 1-11, absorbed: the normed latent and the rotated shared key, as cached, are enough."""
    attention, x_BLD, given = layer("mla"), inputs(), tiny.context(2, 6)
    cache = attention.new_cache(2, 6)
    expected = attention(x_BLD, given, cache)
    (cached_BSX,) = cache.append(torch.zeros(2, 0, 16 + 4, dtype=torch.float64))
    latent_BSC, key_BSR = cached_BSX.split([16, 4], dim=-1)
    query = attention.q_up(attention.q_norm(attention.q_down(x_BLD))).unflatten(-1, (4, 12))
    q_nope, q_rope = query[..., :8], rotate(query[..., 8:], Rope(1e4, 4096), given.positions_BL)
    up_key, up_value = attention.kv_up.weight.view(4, 8 + 6, 16).split([8, 6], dim=1)
    scores = torch.einsum("blhn,hnc,bsc->bhls", q_nope, up_key, latent_BSC)
    scores = (scores + torch.einsum("blhr,bsr->bhls", q_rope, key_BSR)) * 12**-0.5
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(dim=-1)
    o_BLHV = torch.einsum("bhls,bsc,hvc->blhv", weights, latent_BSC, up_value)
    torch.testing.assert_close(
        attention.output(o_BLHV.flatten(-2)), expected, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize(
    ("cuda", "new", "masked", "requested"),
    [
        (True, 8, False, True),
        (True, 1, False, False),
        (True, 8, True, False),
        (False, 8, False, False),
    ],
)
def test_cudnn_is_asked_for_whole_sequences_and_not_for_every_length_of_a_cache(
    cuda: bool, new: int, masked: bool, requested: bool
) -> None:
    q: Any = SimpleNamespace(is_cuda=cuda, shape=(1, 2, new, 4))
    chosen = attend._best_kernel(q, torch.ones(1) if masked else None)
    assert isinstance(chosen, nullcontext) != requested
