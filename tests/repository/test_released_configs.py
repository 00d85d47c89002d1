"""`describe` of a Hugging Face config.json, without weights: the counts of released models, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from lab import Lab

from core.describe import document_of
from core.interop.translation import NO_TRAINING, recipe_of_config

from .released import Released

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 163840,
}
MOONLIGHT = {
    **KIMI_K2,
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": None,
    "routed_scaling_factor": 2.446,
    "quantization_config": None,
}
RELEASED: dict[str, tuple[dict[str, Any], Released]] = {
    "Kimi-K2": (
        KIMI_K2,
        Released(163840, 7168, 61, 1, 64, 1536, 512, 128, 64, 128, 18432, 2048, 384, 1, 8, True),
    ),
    "Moonlight-16B-A3B": (
        MOONLIGHT,
        Released(163840, 2048, 27, 1, 16, None, 512, 128, 64, 128, 11264, 1408, 64, 2, 6, True),
    ),
}
"""A configuration as it was published, and the count by hand."""


def written(folder: Path, config: Any) -> Path:
    """A config.json with this content."""
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a small model."""
    from plugins.hf_deepseek.v3 import DeepSeekV3

    return written(tmp_path, DeepSeekV3.example_config)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_configuration_has_the_parameters_that_it_implies(
    name: str, tmp_path: Path
) -> None:
    released, by_hand = RELEASED[name]
    recipe = recipe_of_config(written(tmp_path, released))
    document = document_of(recipe)
    assert document["params_total"] == by_hand.total
    assert document["params_active"] == by_hand.active
    assert document["precision"]["experts.down"]["computed"] == "bfloat16"
    assert NO_TRAINING in document["notices"]


def test_moonlight_without_embedding_and_output_is_as_published() -> None:
    """15.29 and 2.24 billion (arXiv 2502.16982, table 3)."""
    by_hand = RELEASED["Moonlight-16B-A3B"][1]
    table = by_hand.vocab_size * by_hand.hidden_size
    assert by_hand.total - 2 * table == pytest.approx(15.29e9, rel=0.005)
    assert by_hand.active - table == pytest.approx(2.24e9, rel=0.005)


def test_kimi_k2_is_as_published() -> None:
    """1.04 trillion, of which 32.6 billion are active (arXiv 2507.20534, table 2), up to what is counted as active."""
    by_hand = RELEASED["Kimi-K2"][1]
    assert by_hand.total == pytest.approx(1.04e12, rel=0.015)
    embedding = by_hand.vocab_size * by_hand.hidden_size
    assert by_hand.active < 32.6e9 < by_hand.active + embedding


def test_a_module_of_multi_token_prediction_that_is_mentioned_is_counted(config: Path) -> None:
    assert document_of(recipe_of_config(config))["params_mtp"] > 0


@pytest.mark.parametrize("key", ["text_config", "language_config"])
def test_a_nested_language_model_is_described(
    lab: Lab, tmp_path: Path, config: Path, key: str
) -> None:
    plain = document_of(recipe_of_config(config))
    nested = json.loads(config.read_text())
    outer = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        key: {"model_type": "deepseek_v3", **nested},
        "vision_config": {"hidden_size": 1152},
    }
    (tmp_path / "vl").mkdir()
    found = lab.command("describe", written(tmp_path / "vl", outer), "--json")
    document = json.loads(found.out)
    assert document["params_total"] == plain["params_total"]
    assert any(key in notice for notice in document["notices"])


def test_a_model_type_without_an_architecture_is_known(config: Path) -> None:
    content = json.loads(config.read_text())
    del content["architectures"]
    plain = document_of(recipe_of_config(config))["params_total"]
    for model_type in ("deepseek_v3", "kimi_k2"):
        written(config.parent, {**content, "model_type": model_type})
        assert document_of(recipe_of_config(config))["params_total"] == plain


def test_convert_says_that_it_reads_no_multimodal_model(
    lab: Lab, tmp_path: Path, config: Path
) -> None:
    outer = {"architectures": ["KimiVL"], "text_config": json.loads(config.read_text())}
    (tmp_path / "vl").mkdir()
    file = written(tmp_path / "vl", outer)
    found = lab.command("convert", "from-hf", file.parent, tmp_path / "run")
    assert found.code == 2
    assert found.sentence.startswith(f"{file}: text_config: the checkpoint holds more than")
    assert not (tmp_path / "run").exists()


def test_overrides_change_what_a_configuration_leaves_open(lab: Lab, config: Path) -> None:
    found = lab.command("describe", config, "budget.steps=7", "precision.name=fp64", "--json")
    document = json.loads(found.out)
    assert document["steps"] == 7
    assert document["precision"]["head"]["kept"] == "float64"
    assert document["recipe"] == str(config)
    wrong = lab.command("describe", config, "budget.stepz=7")
    assert wrong.code == 2
    assert wrong.err.startswith("moeloom: command line (budget.stepz=7): budget.stepz: unknown key")


def test_a_folder_and_a_comparison_take_configurations(lab: Lab, config: Path) -> None:
    found = lab.command("describe", "--compare", config.parent, lab.file, "--json")
    documents = json.loads(found.out)
    assert [document["recipe"] for document in documents] == [str(config), str(lab.file)]


WRONG = [
    ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM is not supported"),
    ({"hidden_size": -1}, "hidden_size = -1: must be a whole number"),
    ({"hidden_size": None}, "hidden_size = None: must be a whole number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: must be a finite number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be at most"),
    ({"text_config": [1]}, "text_config = [1]: must be a section"),
    ({"attention_bias": True}, "attention_bias = True: must be false"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_configuration_is_one_sentence(
    lab: Lab, config: Path, change: dict[str, Any], sentence: str
) -> None:
    written(config.parent, {**json.loads(config.read_text()), **change})
    found = lab.command("describe", config)
    assert (found.code, found.out) == (2, "")
    assert found.err.count("\n") == 1
    assert found.err.startswith(f"moeloom: {config}: ")
    assert sentence in found.err


def test_a_missing_file_is_one_sentence(lab: Lab, tmp_path: Path) -> None:
    found = lab.command("describe", tmp_path / "config.json")
    assert found.code == 2
    assert found.err.count("\n") == 1
    assert str(tmp_path / "config.json") in found.err
