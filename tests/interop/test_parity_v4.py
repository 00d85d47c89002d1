"""Routers and experts of DeepSeek-V4 in transformers beside ours, with the same weights: values and slopes in fp64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.testing import bench
from plugins.deepseek_moe.ffn import MixtureOfExperts
from plugins.deepseek_v3_router.router import DeepSeekV3Router
from plugins.hash_gated.router import HashGatedRouter
from plugins.local_dispatch.dispatcher import LocalDispatcher
from plugins.swiglu.ffn import SwiGLU

from .hf_models import transformers_or_skip

DIM, INNER, EXPERTS, TOP_K, VOCABULARY = 32, 12, 8, 3, bench.VOCABULARY
SCALE = 1.5
CLOSE: dict[str, float] = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The module of transformers that holds the model."""
    transformers_or_skip()
    return pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4",
        reason="this transformers has no DeepSeek-V4",
    )


def config_of(theirs: Any, limit: float) -> Any:
    config = theirs.DeepseekV4Config(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        moe_intermediate_size=INNER,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=4,
        routed_scaling_factor=SCALE,
        swiglu_limit=limit,
    )
    config._experts_implementation = "eager"
    assert config.scoring_func == "sqrtsoftplus"
    return config


def draw(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    """Normal numbers in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(*shape, dtype=torch.float64, generator=generator)


def filled(module: Any) -> Any:
    """The module in fp64 with random weights, and a random table if it has one."""
    module = module.double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=seed, size=0.4))
    for name, buffer in module.named_buffers():
        if name.endswith("tid2eid"):
            ids = torch.rand(VOCABULARY, EXPERTS, generator=torch.Generator().manual_seed(3))
            buffer.copy_(ids.argsort(dim=1)[:, :TOP_K])
        elif name.endswith("e_score_correction_bias"):
            buffer.copy_(draw(EXPERTS, seed=9, size=0.3))
    return module


def build() -> Any:
    return replace(bench.build_context(bench.KitPrecision(torch.float64)), dim=DIM)


def tokens() -> SequenceContext:
    return bench.tokens(3, 7)


def by_expert(expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """The gates T x E, 0 for an expert that is not chosen; the order of the choices means nothing."""
    zeros_TE = gate_TK.new_zeros(len(gate_TK), EXPERTS)
    return zeros_TE.scatter(1, expert_TK, gate_TK)


def slopes(result: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a score of the result."""
    weight = torch.linspace(1, 2, result.numel(), dtype=torch.float64).view_as(result)
    return torch.autograd.grad((result.sin() * weight).sum(), sources)


@pytest.mark.parametrize("size", [1.0, 8.0, 60.0])
def test_the_learned_router(theirs: Any, size: float) -> None:
    """Experts, gates, logits, and gradients of tokens and centroids, for logits of up to a few hundred."""
    their = filled(theirs.DeepseekV4TopKRouter(config_of(theirs, 10.0)))
    keys: dict[str, Any] = {"affinity": "sqrt_softplus", "scale": SCALE, "top_k": TOP_K}
    ours = DeepSeekV3Router(DeepSeekV3Router.Config(**keys), build(), experts=EXPERTS)
    ours.centroids.weight.data.copy_(their.weight)
    x_TD = draw(21, DIM, seed=5, size=size).requires_grad_()
    bias_E = their.e_score_correction_bias
    routing = ours(x_TD, lambda scores_TE: scores_TE + bias_E, tokens())
    logits_TE, gate_TK, expert_TK = their(x_TD)
    expected_TE = by_expert(expert_TK, gate_TK)
    found_TE = by_expert(routing.expert_A.view(-1, TOP_K), routing.gate_A.view(-1, TOP_K))
    torch.testing.assert_close(routing.logits_TE, logits_TE, **CLOSE)
    torch.testing.assert_close(found_TE, expected_TE, rtol=1e-9, atol=1e-11)
    found = slopes(found_TE, x_TD, ours.centroids.weight)
    expected = slopes(expected_TE, x_TD, their.weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def hashed(their: Any) -> Any:
    """Our router with the table and centroids of theirs."""
    keys: dict[str, Any] = {"scale": SCALE, "top_k": TOP_K}
    ours = HashGatedRouter(HashGatedRouter.Config(**keys), build(), experts=EXPERTS)
    ours.table.copy_(their.tid2eid)
    ours.centroids.weight.data.copy_(their.weight)
    return ours


def test_the_hash_router(theirs: Any) -> None:
    """The same experts in the same order, with the same gates and gradients."""
    their = filled(theirs.DeepseekV4HashRouter(config_of(theirs, 10.0)))
    ours = hashed(their)
    context = tokens()
    x_TD = draw(21, DIM, seed=5, size=2.0).requires_grad_()
    routing = ours(x_TD, lambda scores_TE: scores_TE, context)
    logits_TE, gate_TK, expert_TK = their(x_TD, context.tokens_BL)
    assert torch.equal(routing.expert_A.view(-1, TOP_K), expert_TK)
    found_TK = routing.gate_A.view(-1, TOP_K)
    torch.testing.assert_close(routing.logits_TE, logits_TE, **CLOSE)
    torch.testing.assert_close(found_TK, gate_TK, **CLOSE)
    found = slopes(found_TK, x_TD, ours.centroids.weight)
    expected = slopes(gate_TK, x_TD, their.weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


LIMITS = [0.5, 10.0]


@pytest.mark.parametrize("limit", LIMITS)
def test_a_dense_layer(theirs: Any, limit: float) -> None:
    """Two fifths of the gates and four fifths of the ups exceed the smaller limit, and none the larger one."""
    config = config_of(theirs, limit)
    their = filled(theirs.DeepseekV4MLP(config))
    inner = their.intermediate_size
    ours = SwiGLU(SwiGLU.Config(hidden=inner, swiglu_limit=limit), build())
    ours.gate_up.weight.data.copy_(torch.cat([their.gate_proj.weight, their.up_proj.weight]))
    ours.down.weight.data.copy_(their.down_proj.weight)
    x_BLD = draw(3, 7, DIM, seed=5).requires_grad_()
    found, expected = ours(x_BLD, tokens())[0], their(x_BLD)
    torch.testing.assert_close(found, expected, **CLOSE)
    (by_input,), (wanted,) = slopes(found, x_BLD), slopes(expected, x_BLD)
    torch.testing.assert_close(by_input, wanted, rtol=1e-9, atol=1e-10)


def layer(their: Any, limit: float, router: Any) -> Any:
    """Our layer with experts, with the weights of theirs and a router that is made already."""
    section = bench.section("router", bench.KitRouter)
    config = MixtureOfExperts.Config(
        experts=EXPERTS,
        expert_hidden=INNER,
        router=section,
        dispatcher=bench.section("dispatcher", LocalDispatcher),
        swiglu_limit=limit,
        shared_experts=1,
    )
    ours = MixtureOfExperts(config, build())
    ours.router = router
    ours.routed.gate_up.weight.data.copy_(their.experts.gate_up_proj)
    ours.routed.down.weight.data.copy_(their.experts.down_proj)
    shared = their.shared_experts
    ours.shared.gate_up.weight.data.copy_(
        torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    )
    ours.shared.down.weight.data.copy_(shared.down_proj.weight)
    return ours


@pytest.mark.parametrize("limit", LIMITS)
def test_a_hashed_layer_with_experts(theirs: Any, limit: float) -> None:
    """Shared and routed experts, in training, in evaluation and for few tokens of decoding."""
    their = filled(theirs.DeepseekV4SparseMoeBlock(config_of(theirs, limit), 0))
    ours = layer(their, limit, hashed(their.gate))
    context = tokens()
    x_BLD = draw(3, 7, DIM, seed=5).requires_grad_()
    found, expected = ours.train()(x_BLD, context)[0], their(x_BLD, context.tokens_BL)
    torch.testing.assert_close(found, expected, **CLOSE)
    own = (
        x_BLD,
        ours.routed.gate_up.weight,
        ours.routed.down.weight,
        ours.router.centroids.weight,
    )
    wanted = (x_BLD, their.experts.gate_up_proj, their.experts.down_proj, their.gate.weight)
    for one, other in zip(slopes(found, *own), slopes(expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    few = replace(context, recorded=False)
    with torch.no_grad():
        decoded, record = ours.eval()(x_BLD, few)
    assert record is None
    torch.testing.assert_close(decoded, expected, **CLOSE)
