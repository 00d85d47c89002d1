"""Checkpoints of random numbers, written tensor by tensor as the released files are named, without a converter."""

import json
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "float32",
    "bos_token_id": 3,
    "eos_token_id": [5, 7],
}
V2 = {
    **{k: v for k, v in V3.items() if k != "num_nextn_predict_layers"},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
}
V32 = {
    **V3,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 5,
}


def block_shapes(
    config: Mapping[str, Any], layer: int, *, packed: bool = False
) -> dict[str, tuple[int, ...]]:
    """One layer, by hand."""
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rank, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (dim,),
        "post_attention_layernorm.weight": (dim,),
    }
    if q_rank is None:
        shapes["self_attn.q_proj.weight"] = (heads * key, dim)
    else:
        shapes["self_attn.q_a_proj.weight"] = (q_rank, dim)
        shapes["self_attn.q_a_layernorm.weight"] = (q_rank,)
        shapes["self_attn.q_b_proj.weight"] = (heads * key, q_rank)
    shapes["self_attn.kv_a_proj_with_mqa.weight"] = (rank + config["qk_rope_head_dim"], dim)
    shapes["self_attn.kv_a_layernorm.weight"] = (rank,)
    shapes["self_attn.kv_b_proj.weight"] = (
        heads * (config["qk_nope_head_dim"] + config["v_head_dim"]),
        rank,
    )
    shapes["self_attn.o_proj.weight"] = (dim, heads * config["v_head_dim"])
    if layer < config["first_k_dense_replace"]:
        return shapes | swiglu_shapes("mlp", dim, config["intermediate_size"])
    experts, hidden = config["n_routed_experts"], config["moe_intermediate_size"]
    shapes["mlp.gate.weight"] = (experts, dim)
    if config["model_type"] == "deepseek_v3":
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    if packed:
        shapes["mlp.experts.gate_up_proj"] = (experts, 2 * hidden, dim)
        shapes["mlp.experts.down_proj"] = (experts, dim, hidden)
    else:
        for expert in range(experts):
            shapes |= swiglu_shapes(f"mlp.experts.{expert}", dim, hidden)
    return shapes | swiglu_shapes("mlp.shared_experts", dim, config["n_shared_experts"] * hidden)


def swiglu_shapes(prefix: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Three matrices."""
    return {
        f"{prefix}.gate_proj.weight": (hidden, dim),
        f"{prefix}.up_proj.weight": (hidden, dim),
        f"{prefix}.down_proj.weight": (dim, hidden),
    }


def tensors_of(
    config: Mapping[str, Any],
    *,
    packed: bool = False,
    depths: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, with the multi-token modules' copies; biases in fp32."""
    dim, vocabulary, layers = (
        config["hidden_size"],
        config["vocab_size"],
        config["num_hidden_layers"],
    )
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, dim),
        "model.norm.weight": (dim,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, dim)
    for layer in range(layers + depths):
        inner = block_shapes(config, layer, packed=packed)
        if layer >= layers:
            inner |= {
                "enorm.weight": (dim,),
                "hnorm.weight": (dim,),
                "eh_proj.weight": (dim, 2 * dim),
            }
            inner |= {"shared_head.norm.weight": (dim,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    draw = torch.Generator().manual_seed(len(shapes))
    tensors = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}
    tensors = {name: t if name.endswith("_bias") else t.to(dtype) for name, t in tensors.items()}
    for layer in range(layers, layers + depths):
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors[
            "model.embed_tokens.weight"
        ].clone()
        head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = head.clone()
    return tensors


def in_blocks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with matrices of attention and feed-forward layers in FP8: a loop over blocks of 128 x 128."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if "_proj" in name and "eh_proj" not in name:
            rows, columns = tensor.shape
            codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
            scales = torch.empty(ceil(rows / 128), ceil(columns / 128))
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                    scales[i, j] = tensor[place].float().abs().max() / 448
                    codes[place] = (
                        (tensor[place].float() / scales[i, j]).clamp(-448, 448).to(codes.dtype)
                    )
            result[name], result[f"{name}_scale_inv"] = codes, scales
    return result


def out_of_blocks(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes times scales, by a loop."""
    result = {name: t for name, t in tensors.items() if not name.endswith("_scale_inv")}
    for name, codes in result.items():
        if codes.dtype == torch.float8_e4m3fn:
            wide, scales = codes.float(), tensors[f"{name}_scale_inv"]
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    wide[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scales[i, j]
            result[name] = wide.to(dtype)
    return result


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: int = 1
) -> Path:
    """A checkpoint, by the safetensors library."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    names = list(tensors)
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        own = names[number::files]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return tensors


def same_bits(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    """The same names, formats, shapes and bits."""
    assert sorted(one) == sorted(two)
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype, name
        assert one[name].shape == tensor.shape, name
        assert (
            one[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
        ), name
