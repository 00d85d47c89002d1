"""Checkpoint formats: configurations and recipes of the same model, and the errors in either direction."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.contracts.errors import ConfigError, UserError
from core.interop.translation import composed
from plugins.hf_deepseek.v2 import DeepSeekV2
from plugins.hf_deepseek.v3 import DeepSeekV3
from plugins.hf_deepseek.v32 import DeepSeekV32

from .checkpoints import V2, V3, V32

FORMATS = {
    "deepseek_v3": (DeepSeekV3, V3),
    "deepseek_v2": (DeepSeekV2, V2),
    "deepseek_v32": (DeepSeekV32, V32),
}


def recipe_of(config: dict[str, Any], names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The resolved recipe of a configuration."""
    made = FORMATS[config["model_type"]][0](None)
    return composed(made.recipe_of(config, names, "fp32").recipe, "it").to_dict()


def put(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one key changed."""
    changed = copy.deepcopy(recipe)
    *way, last = path.split(".")
    at: Any = changed
    for key in way:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[last] = value
    return changed


def test_the_released_v3_configuration_gives_the_shipped_recipe() -> None:
    """The configuration is the one published with the weights; of ours only the model is compared."""
    from core.recipe.compose import compose

    released = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "topk_method": "noaux_tc",
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "hidden_act": "silu",
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-06,
        "num_nextn_predict_layers": 1,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }
    model = recipe_of(released, ("model.layers.61.enorm.weight",))["model"]
    ours = compose("dsv3_671b").to_dict()["model"]
    assert model["attention"] == ours["attention"]
    assert (model["dim"], model["norm_eps"]) == (ours["dim"], ours["norm_eps"])
    assert model["blocks"]["dense"] == ours["blocks"]["dense"]
    theirs, mine = model["blocks"]["moe"], ours["blocks"]["moe"]
    for section in (theirs, mine):
        section["ffn"].pop("balance")
        router = section["ffn"]["router"]
        router["group_score"] = router["group_score"] or router["top_k"] // router["group_limit"]
    assert theirs == mine
    assert model["heads"]["mtp"]["depth"] == 1
    yarn = {"factor": 40.0, "original_length": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
    assert model["rope"]["yarn"] == {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert model["rope"]["max_length"] == 163840


def test_the_full_model_has_the_published_number_of_parameters() -> None:
    """Selection biases included; of the multi-token module what it does not share."""
    from core.recipe.compose import compose

    recipe, made = compose("dsv3_671b").to_dict(), DeepSeekV3(None)
    listed = list(made.tensor_mappings(made.config_of(recipe), recipe, None))
    own = [(".layers.61." in p.theirs, math.prod(p.shape)) for p in listed if not p.copy]
    assert sum(size for module, size in own if not module) == 671_026_419_200
    assert sum(size for module, size in own if module) == 11_610_068_224
    assert [p.theirs for p in listed if p.copy] == [
        f"model.layers.61.{n}.weight" for n in ("embed_tokens", "shared_head.head")
    ]


def test_formats_are_read_without_torch() -> None:
    probe = (
        "import sys, plugins.hf_deepseek.v2, plugins.hf_deepseek.v3; "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


GIVEN = {
    "equal": (0.8, 0.8),
    "different": (0.6, 1.2),
    "no mscale": (None, 0.9),
    "no all_dim": (0.9, None),
}
GIVEN |= {"neither": (None, None)}


def theirs(factor: float, mscale: float | None, all_dim: float | None) -> tuple[float, float]:
    """Factors on cos and sin, and on the softmax scale, by transformers' code."""

    def m(x: float) -> float:
        return 0.1 * x * math.log(factor) + 1 if factor > 1 else 1.0

    ratio = m(mscale) / m(all_dim) if mscale and all_dim else m(1)
    return ratio, m(all_dim) ** 2 if all_dim else 1.0


def ours(yarn: dict[str, Any]) -> tuple[float, float]:
    """The same two by this repository's model."""
    from core.model.rope import temperature

    factor, mscale, all_dim = yarn["factor"], yarn["mscale"], yarn["mscale_all_dim"]
    over = temperature(factor, all_dim)
    return temperature(factor, mscale) / over, over**2


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("case", GIVEN)
def test_yarn_means_the_same_there_here_and_there_again(case: str, modern: bool) -> None:
    mscale, all_dim = GIVEN[case]
    scaling = {"factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 20}
    scaling |= {k: v for k, v in (("mscale", mscale), ("mscale_all_dim", all_dim)) if v is not None}
    config = {k: v for k, v in V3.items() if k != "rope_theta"}
    if modern:
        config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 5000.0, **scaling}
    else:
        config |= {"rope_scaling": {"type": "yarn", **scaling}, "rope_theta": 5000.0}
    recipe = recipe_of(config)
    rope = recipe["model"]["rope"]
    assert (rope["theta"], rope["yarn"]["beta_fast"], rope["yarn"]["beta_slow"]) == (
        5000.0,
        20.0,
        1.0,
    )
    assert ours(rope["yarn"]) == pytest.approx(theirs(40.0, mscale, all_dim), rel=1e-14)
    again = DeepSeekV3(None).config_of(recipe)
    back = again["rope_scaling"]
    ratio, scale = theirs(40.0, back.get("mscale"), back.get("mscale_all_dim"))
    ratio = back.get("attention_factor", ratio)
    assert (ratio, scale) == pytest.approx(theirs(40.0, mscale, all_dim), rel=1e-14)
    reread = recipe_of(again)["model"]["rope"]["yarn"]
    assert ours(reread) == pytest.approx(ours(rope["yarn"]), rel=1e-14)


@pytest.mark.parametrize(
    ("mscale", "all_dim"), [(1.0, 1.0), (0.7, None), (None, 0.7), (None, None), (1.0, None)]
)
def test_our_own_yarn_is_written_so_that_it_means_the_same(
    mscale: float | None, all_dim: float | None
) -> None:
    yarn = {"factor": 8.0, "original_length": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    yarn |= {"mscale": mscale, "mscale_all_dim": all_dim}
    recipe = put(recipe_of(V3), "model.rope", {"theta": 1e4, "max_length": 128, "yarn": yarn})
    scaling = DeepSeekV3(None).config_of(recipe)["rope_scaling"]
    ratio, scale = theirs(8.0, scaling.get("mscale"), scaling.get("mscale_all_dim"))
    assert (scaling.get("attention_factor", ratio), scale) == pytest.approx(ours(yarn), rel=1e-14)


def test_an_attention_factor_of_theirs_is_followed() -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.5,
    }
    rope = recipe_of({**V3, "rope_parameters": scaling})["model"]["rope"]
    assert ours(rope["yarn"])[0] == pytest.approx(1.5, rel=1e-14)


def test_positions_beyond_yarns_reach_are_cut_and_reported() -> None:
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    translation = DeepSeekV3(None).recipe_of({**V3, "rope_scaling": scaling}, (), "fp32")
    assert translation.recipe["model"]["rope"]["max_length"] == 32
    assert "more than YaRN's factor allows" in translation.notices[0]


NOT_SUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"hidden_act": "gelu"}, "hidden_act"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
    ("deepseek_v3", {"attention_dropout": 0.1}, "attention_dropout"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3", {"scoring_func": "sqrtsoftplus"}, "scoring_func"),
    ("deepseek_v3", {"swiglu_limit": 10.0}, "swiglu_limit"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("deepseek_v3", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    ("deepseek_v3", {"num_experts_per_tok": 3}, "num_experts_per_tok"),
    ("deepseek_v3", {"n_group": 3}, "n_group"),
    ("deepseek_v3", {"n_group": 4}, "n_group"),
    ("deepseek_v3", {"topk_group": 3}, "topk_group"),
    ("deepseek_v3", {"hidden_size": "24"}, "hidden_size"),
    ("deepseek_v3", {"vocab_size": 0}, "vocab_size"),
    ("deepseek_v3", {"routed_scaling_factor": None}, "routed_scaling_factor"),
    ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters"),
    (
        "deepseek_v3",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
        "rope_scaling",
    ),
    ("deepseek_v3", {"partial_rotary_factor": 0.5}, "rope_parameters"),
    ("deepseek_v3", {"rope_parameters": 3}, "rope_parameters"),
    ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": "two"}}, "rope_scaling"),
    (
        "deepseek_v3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": True}},
        "rope_parameters",
    ),
    ("deepseek_v3", {"rope_theta": "10000"}, "rope_theta"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
    ("deepseek_v2", {"swiglu_limit": 7}, "swiglu_limit"),
    ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank"),
    ("deepseek_v32", {"index_topk": 0}, "index_topk"),
    ("deepseek_v32", {"index_n_heads": 2.5}, "index_n_heads"),
    ("deepseek_v32", {"rope_interleave": False}, "rope_interleave"),
]


@pytest.mark.parametrize(
    ("name", "change", "key"), NOT_SUPPORTED, ids=lambda value: str(value)[:40]
)
def test_a_setting_that_no_model_here_follows_is_refused_by_its_key(
    name: str, change: dict[str, Any], key: str
) -> None:
    made, config = FORMATS[name]
    with pytest.raises(ConfigError) as caught:
        made(None).recipe_of({**config, **change}, (), "fp32")
    assert caught.value.key == key


FFN = "model.blocks.moe.ffn"
UNSPEAKABLE: list[tuple[str, str, Any, str]] = [
    ("deepseek_v3", "model.attention", {"name": "mha", "heads": 2}, "mla"),
    (
        "deepseek_v3",
        "model.blocks.dense.attention",
        {"name": "mha", "heads": 2},
        "same in all blocks",
    ),
    ("deepseek_v3", "model.norm_eps", 1e-5, "1e-06"),
    ("deepseek_v3", f"{FFN}.router.affinity", "softmax", "sigmoid"),
    ("deepseek_v3", f"{FFN}.router.group_score", 1, "group_score must be 2"),
    ("deepseek_v3", f"{FFN}.router.affinity", "sqrt_softplus", "sigmoid"),
    ("deepseek_v3", f"{FFN}.router", {"name": "hash_gated", "top_k": 2}, "hash_gated"),
    ("deepseek_v3", f"{FFN}.swiglu_limit", 10.0, "does not clamp"),
    ("deepseek_v3", "model.blocks.dense.ffn.swiglu_limit", 10.0, "does not clamp"),
    ("deepseek_v2", f"{FFN}.swiglu_limit", 10.0, "does not clamp"),
    ("deepseek_v3", f"{FFN}.router", {"name": "switch"}, "switch"),
    ("deepseek_v3", f"{FFN}.balance.0.form", "multiplicative", "additive"),
    ("deepseek_v3", "model.heads.other", {"name": "mtp", "depth": 1}, "one mtp"),
    (
        "deepseek_v3",
        "model.heads.mtp",
        {"name": "mtp", "depth": 1, "reads": "streams"},
        "must be collapsed",
    ),
    ("deepseek_v3", "model.residual", {"name": "hyper_connections"}, "must be add"),
    ("deepseek_v2", "model.residual", {"name": "hyper_connections"}, "must be add"),
    ("deepseek_v3", "model.heads.other", {"name": "cosine"}, "no other heads"),
    ("deepseek_v2", f"{FFN}.router", {"name": "deepseek_v3", "top_k": 2}, "deepseek_v2"),
    ("deepseek_v2", f"{FFN}.balance", [{"name": "bias", "form": "additive"}], "no selection bias"),
    ("deepseek_v2", "model.heads.mtp", {"name": "mtp", "depth": 1}, "no multi-token module"),
]


@pytest.mark.parametrize(
    ("name", "path", "value", "word"), UNSPEAKABLE, ids=lambda value: str(value)[:40]
)
def test_a_model_that_the_architecture_has_no_words_for_is_refused(
    name: str, path: str, value: Any, word: str
) -> None:
    made, config = FORMATS[name]
    recipe = recipe_of(config, ("model.layers.3.enorm.weight",) if name == "deepseek_v3" else ())
    if "mtp" not in recipe["model"]["heads"] and "other" in path:
        recipe["model"]["heads"]["mtp"] = {"name": "mtp", "depth": 1}
    with pytest.raises(ConfigError, match=word):
        made(None).config_of(put(recipe, path, value))


def test_layers_that_differ_or_stand_otherwise_are_refused() -> None:
    blocks = recipe_of(V3)["model"]["blocks"]
    wider = put(blocks["moe"], "ffn.expert_hidden", 24)
    with pytest.raises(ConfigError, match="same in all blocks"):
        DeepSeekV3(None).config_of(put(recipe_of(V3), "model.blocks", {**blocks, "wide": wider}))
    with pytest.raises(ConfigError, match="all dense blocks before"):
        DeepSeekV3(None).config_of(
            put(recipe_of(V3), "model.blocks", {"moe": blocks["moe"], "dense": blocks["dense"]})
        )


def test_blocks_of_one_kind_under_two_names_are_one_kind() -> None:
    blocks = recipe_of(V3)["model"]["blocks"]
    split = {
        "a": blocks["dense"],
        "b": blocks["moe"],
        "c": put(blocks["moe"], "ffn.balance.1.alpha", 0.5),
    }
    config = DeepSeekV3(None).config_of(put(recipe_of(V3), "model.blocks", split))
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (5, 1)


def test_a_run_without_a_selection_bias_is_written_with_zeros() -> None:
    recipe = put(recipe_of(V3), f"{FFN}.balance", [])
    made = DeepSeekV3(None)
    biases = [
        p
        for p in made.tensor_mappings(made.config_of(recipe), recipe, None)
        if "e_score" in p.theirs
    ]
    assert [p.ours for p in biases] == [None, None]


@pytest.mark.parametrize("place", [0, 1])
def test_the_bias_of_a_run_balanced_by_quantiles_is_written(place: int) -> None:
    balance: list[dict[str, Any]] = [{"name": "sequence", "alpha": 0.0001}]
    balance.insert(place, {"name": "quantile", "bins": 1000})
    recipe = put(recipe_of(V3), f"{FFN}.balance", balance)
    made = DeepSeekV3(None)
    mappings = made.tensor_mappings(made.config_of(recipe), recipe, None)
    biases = [p.ours for p in mappings if "e_score" in p.theirs]
    assert biases == [f"blocks.{layer}.ffn.balance.{place}.bias" for layer in (1, 2)]


def test_what_cannot_be_built_is_reported_of_the_configuration() -> None:
    with pytest.raises(UserError, match=r"gives no model that can be built here: .*rope_dim = 7"):
        recipe_of({**V3, "qk_rope_head_dim": 7})
