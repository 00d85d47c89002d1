"""The sparse attention of transformers with our weights in it, and its checkpoints converted both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from model import tiny
from torch import Tensor

import core
from core.contracts.context import SequenceContext

from .hf_models import fill, random_tokens, read_tensors, transformers_or_skip
from .parity import FP32, assert_same_model

YARN = "model.rope={max_length: 128, yarn: {factor: 4, original_length: 32, mscale: 1.0, mscale_all_dim: 1.0}}"
OURS_TO_THEIRS = {
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "output": "o_proj",
    "indexer.q": "indexer.wq_b",
    "indexer.k": "indexer.wk",
    "indexer.k_norm": "indexer.k_norm",
    "indexer.weights": "indexer.weights_proj",
}
HEADS = (*tiny.SPARSE, *tiny.FP32, "model.attention.index_heads=16")
"""So many heads that no query gets scores of exactly 0 from all of them: transformers leaves the order of ties open."""

LENGTH = 24


@pytest.fixture(scope="module")
def hf() -> Any:
    return transformers_or_skip()


def theirs(hf: Any, ours: Any, rope: dict[str, Any], top_k: int) -> tuple[Any, Any]:
    """Their attention layer with the weights of ours, and their rotary embedding."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as modeling

    c = ours.config
    config = hf.DeepseekV32Config(
        hidden_size=32,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        q_lora_rank=c.q_rank,
        kv_lora_rank=c.kv_rank,
        qk_nope_head_dim=c.nope_dim,
        qk_rope_head_dim=c.rope_dim,
        v_head_dim=c.value_dim,
        index_n_heads=c.index_heads,
        index_head_dim=c.index_dim,
        index_topk=top_k,
        max_position_embeddings=128,
        num_hidden_layers=1,
        rope_parameters=rope,
    )
    config._attn_implementation = "eager"
    layer = modeling.DeepseekV32Attention(config, 0).eval()
    state: dict[str, Tensor] = ours.state_dict()
    renamed = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{OURS_TO_THEIRS[module]}.{leaf}"] = tensor
    layer.load_state_dict(renamed, strict=True)
    return layer, modeling.DeepseekV32RotaryEmbedding(config)


@pytest.mark.parametrize("top_k", [1, 5, 40])
@pytest.mark.parametrize("yarn", [False, True])
def test_the_layer_of_transformers_has_the_same_outputs(hf: Any, yarn: bool, top_k: int) -> None:
    """fp32, 1e-5; with YaRN queries and keys of the indexer are rotated by the same frequencies."""
    more = (YARN,) if yarn else ()
    model = tiny.build(*HEADS, *more, f"model.attention.top_k={top_k}").eval()
    ours = model.blocks[0].attention
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:
        rope = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    layer, rotary = theirs(hf, ours, rope, top_k)
    draw = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(2, LENGTH, 32, generator=draw)
    position_BL = torch.arange(LENGTH)[None]
    hidden_LL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(hidden_LL, torch.finfo(torch.float32).min)
    context = SequenceContext.of(torch.zeros(2, LENGTH, dtype=torch.int64))
    with torch.no_grad():
        expected_BLD, _ = layer(x_BLD, rotary(x_BLD, position_BL), mask)
        found_BLD, _ = ours(x_BLD, context)
    torch.testing.assert_close(found_BLD, expected_BLD, rtol=1e-5, atol=1e-5)
    dense = tiny.build(*HEADS, *more, "model.attention.top_k=40").blocks[0].attention
    with torch.no_grad():
        far = (dense(x_BLD, context)[0] - found_BLD).abs().max()
    assert (far < 1e-5) == (top_k == 40), "the choice matters"


SMALL = {
    "vocab_size": 263,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 6,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "index_n_heads": 16,
    "index_head_dim": 20,
    "index_topk": 7,
}
"""A small configuration of V3.2."""


def test_a_checkpoint_of_transformers_is_read_with_its_logits_and_written_back_bit_by_bit(
    hf: Any, lab: Lab, tmp_path: Path
) -> None:
    """The converted model chooses 7 of up to 24 positions; what is written opens in transformers with its logits."""
    config = hf.DeepseekV32Config(
        **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    model = hf.DeepseekV32ForCausalLM(config).double().eval()
    fill(model, 0)
    model = model.float()
    model.save_pretrained(tmp_path / "theirs")
    tokens_BL = random_tokens(2, LENGTH)
    for command, source, target in (
        ("from-hf", tmp_path / "theirs", tmp_path / "run"),
        ("to-hf", tmp_path / "run", tmp_path / "back"),
    ):
        result = lab.command("convert", command, source, target)
        assert result.code == 0, result.err
    run = core.load(tmp_path / "run")
    assert_same_model(run, model, tokens_BL, FP32)
    assert run.blocks[0].attention.config.top_k == 7
    first, second = read_tensors(tmp_path / "theirs"), read_tensors(tmp_path / "back")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back").float().eval()
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(tokens_BL).logits, model(tokens_BL).logits)


def test_a_run_of_ours_with_a_warm_up_behind_it_opens_in_transformers(
    hf: Any, lab: Lab, tmp_path: Path
) -> None:
    sparse = (
        "model.attention={name: sparse, heads: 2, q_rank: 16, kv_rank: 16, nope_dim: 8, rope_dim: 4, value_dim: 8, "
        "index_heads: 16, index_dim: 8, top_k: 5, warmup_steps: 1}"
    )
    exported = "model.blocks.moe.ffn.router.group_score=2"
    run = tmp_path / "run"
    lab.fit(run, sparse, exported, "budget.steps=2", "validation.every_steps=2")
    result = lab.command("convert", "to-hf", run, tmp_path / "theirs", "--dtype", "fp32")
    assert result.code == 0, result.err
    theirs_model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").float().eval()
    assert_same_model(core.load(run), theirs_model, random_tokens(2, 16), FP32)
