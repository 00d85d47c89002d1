"""Sizes and FLOPs: the tiny model by hand, DeepSeek-V3 against the published numbers (A4, A17, P39)."""

from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import core
from core.analysis.size import Size, size_of
from core.contracts.context import SequenceContext
from core.model.language_model import LanguageModel

from . import tiny

D, V, E, K = 32, 300, 8, 2
ATTENTION = 24 * D + 24 + 4 * 12 * 24 + 20 * D + 16 + 4 * 14 * 16 + D * 24
EXPERT, SHARED, DENSE = 3 * 12 * D, 3 * 24 * D, 3 * 40 * D
NORMS = 2 * D
MIXING = 2 * 4 * (12 + 6) * 16 / 2

BLOCKS = """{
  dense: {count: 3, ffn: {name: swiglu, hidden: 18432}},
  moe: {count: 58, ffn: {name: moe, experts: 256, expert_hidden: 2048, shared_experts: 1,
        router: {name: deepseek_v3, top_k: 8, groups: 8, group_limit: 4, scale: 2.5},
        balance: [{name: bias, rate: 0.001}, {name: sequence, alpha: 0.0001}]}}}"""
MLA = "{name: mla, heads: 128, q_rank: 1536, kv_rank: 512, nope_dim: 128, rope_dim: 64, value_dim: 128}"
DEEPSEEK_V3 = (
    "model.dim=7168",
    f"model.attention={MLA}",
    f"model.blocks={' '.join(BLOCKS.split())}",
    "model.heads.mtp={name: mtp, depth: 1, weight: 0.3}",
    "data.tokenizer.vocab=129280",
    "data.sequence_length=4096",
    "precision.name=bf16",
)


@cache
def deepseek_v3() -> Size:
    """The released model's size, on the meta device."""
    return size_of(core.build(tiny.compose(*DEEPSEEK_V3), device="meta"))


def test_the_tiny_model_by_hand() -> None:
    moe = E * EXPERT + SHARED + E * D + E  # centroids and selection biases last
    active_moe = K * EXPERT + SHARED + E * D
    main = 2 * V * D + D + 3 * (ATTENTION + NORMS) + DENSE + 2 * moe
    active = V * D + D + 3 * (ATTENTION + NORMS) + DENSE + 2 * active_moe
    depth = 3 * D + 2 * D * D + ATTENTION + NORMS
    size = size_of(tiny.build(*tiny.MTP))
    assert size.params_total == main
    assert size.params_heads == 2 * (depth + moe)
    assert size.params_active == active
    assert size.cache_elements == 3 * 20
    assert size.flops_per_token_main == 6 * active + 3 * 3 * MIXING
    heads = 2 * (6 * (depth + active_moe + V * D) + 3 * MIXING)
    assert size.flops_per_token == size.flops_per_token_main + heads


def test_a_model_without_heads_of_its_own() -> None:
    with_mtp, without = size_of(tiny.build(*tiny.MTP)), size_of(tiny.build())
    assert without.params_heads == 0
    assert without.flops_per_token == without.flops_per_token_main == with_mtp.flops_per_token_main
    assert without.params_total == with_mtp.params_total


def test_a_tied_output_is_active_although_it_owns_nothing() -> None:
    """ "Embedding excluded, output included": one matrix less in total, the same product for every token."""
    tied, untied = size_of(tiny.build("model.tied_embedding=true")), size_of(tiny.build())
    assert untied.params_total - tied.params_total == V * D
    assert tied.params_active == untied.params_active
    assert tied.flops_per_token_main == untied.flops_per_token_main


def test_the_meta_device_gives_the_same_size() -> None:
    recipe = tiny.compose(*tiny.MTP)
    assert size_of(core.build(recipe, device="meta")) == size_of(core.build(recipe))


@pytest.mark.parametrize(("name", "elements"), [("mla", 20), ("mha", 64), ("gqa", 32), ("mqa", 16)])
def test_cache_elements_of_every_attention(name: str, elements: int) -> None:
    assert size_of(tiny.build(*tiny.ATTENTIONS[name])).cache_elements == 3 * elements


def test_A4_deepseek_v3_parameters() -> None:
    """58 x 256 selection biases included; the multi-token module apart, its own biases included."""
    assert deepseek_v3().params_total == 671_026_419_200
    assert deepseek_v3().params_heads == 11_610_068_224
    idle = (
        129_280 * 7168 + 58 * 256 + 58 * (256 - 8) * 3 * 2048 * 7168
    )  # embedding, biases, experts not chosen
    assert deepseek_v3().params_active == 671_026_419_200 - idle == 36_625_603_584


def test_A4_deepseek_v3_cache() -> None:
    assert deepseek_v3().cache_elements == 35_136
    assert 2 * deepseek_v3().cache_elements == 70_272


def test_A17_deepseek_v3_flops() -> None:
    """250.5 GFLOPs a token of 4,096: 6 x active (output included) and half the square of attention."""
    assert deepseek_v3().flops_per_token_main == pytest.approx(250.5e9, abs=0.1e9)
    attention = 3 * 61 * 128 * (192 + 128) * 4096
    assert deepseek_v3().flops_per_token_main == 6 * deepseek_v3().params_active + attention


def test_attention_parameters_of_a_deepseek_v3_layer() -> None:
    dense = "model.blocks={dense: {count: 1, ffn: {name: swiglu, hidden: 8}}, moe: {count: 0}}"
    model = core.build(
        tiny.compose("model.dim=7168", f"model.attention={MLA}", dense), device="meta"
    )
    assert (
        sum(p.numel() for p in model.get_submodule("blocks.0.attention").parameters())
        == 187_107_328
    )


def counted(model: LanguageModel, length: int) -> int:
    """FLOPs of one forward of the main model as torch counts them."""
    context = SequenceContext.of(torch.zeros(1, length, dtype=torch.int64))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.output(model.hidden(context)[0])
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "overrides", [("model.attention.value_dim=12",), *list(tiny.ATTENTIONS.values())[2:]]
)
def test_P39_costs_agree_with_torchs_own_count(overrides: tuple[str, ...]) -> None:
    """Every matrix product and the full square of attention, of which costs count the causal half."""
    length = 16
    model = core.build(tiny.compose(*overrides))
    costs = model.costs()
    vectors = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 1)
    assert counted(model, length) == length * (
        2 * (costs.active - vectors) + 2 * costs.attention_flops
    )
