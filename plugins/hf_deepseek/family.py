"""What `deepseek_v3` and `deepseek_v2` share: configuration to recipe and back, and the tensor mappings."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from core.contracts.checkpoint_format import CheckpointFormat, TensorMapping, Translation
from core.contracts.errors import ConfigError
from plugins.hf_deepseek import yarn
from plugins.hf_deepseek.config import (
    FP8,
    LATENT_EPS,
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_ROWS,
    HfConfig,
)
from plugins.hf_deepseek.layout import HfLayout, layout_of
from plugins.hf_deepseek.names import tensor_mappings

TRAINING_LENGTH = 4096
"""Sequence length of a converted run's recipe, unless the model reads less."""

FINAL_LR = 7.3e-6
"""The last learning rate of DeepSeek-V3 (report, section 4.2), with which the training of a converted run begins."""

EXAMPLE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
"""Configuration of a small model, for the conformance kit."""


class DeepSeek(CheckpointFormat):
    """What both generations share; subclasses translate the router, the balancers and the keys of their own."""

    defaults: ClassVar[Mapping[str, Any]]
    biased: ClassVar[bool]
    attention_name: ClassVar[str] = "mla"
    fp8_config = FP8

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def recipe_of(
        self, config: Mapping[str, Any], names: Collection[str] | None, precision: str
    ) -> Translation:
        """Translates every key that a forward depends on, or raises `ConfigError`."""
        given = HfConfig(config, self.defaults)
        given.check(**self.allowed())
        rope, notices = yarn.rope_of(config, given.count("max_position_embeddings"))
        heads: dict[str, Any] = {"next_token": {"name": "next_token"}}
        depths = given.count("num_nextn_predict_layers", 0, MOST_LAYERS)
        layers = given.count("num_hidden_layers", 1, MOST_LAYERS)
        if names is not None:
            _check_against_files(given, layers, depths, names)
        module = f"model.layers.{layers}."
        is_present = names is None or any(name.startswith(module) for name in names)
        if depths and is_present:
            heads["mtp"] = {"name": "mtp", "depth": depths}
        elif depths:
            notices.append(
                "num_nextn_predict_layers is set, and there are no such weights: no multi-token head is made"
            )
        model = {
            "dim": given.count("hidden_size"),
            "attention": self.attention_of(given),
            "rope": rope,
            "init": {"std": given.number("initializer_range")},
            "norm_eps": given.number("rms_norm_eps"),
            "tied_embedding": bool(given.get("tie_word_embeddings")),
            "blocks": self._blocks(given),
            "heads": heads,
        }
        data = {
            "tokenizer": {"vocab": given.count("vocab_size")},
            "sequence_length": min(rope["max_length"], TRAINING_LENGTH),
        }
        recipe = {
            "model": model,
            "precision": {"name": precision},
            "data": data,
            "optimizer": {"name": "adamw", "lr": FINAL_LR},
            "batch": {"sequences": 1},
            "budget": {"steps": 1000},
        }
        return Translation(recipe, tuple(notices))

    def _blocks(self, given: HfConfig) -> dict[str, Any]:
        """Returns our `model.blocks`: dense layers, then layers with experts."""
        layers = given.count("num_hidden_layers", 1, MOST_LAYERS)
        dense = given.count("first_k_dense_replace", 0)
        if given.get("n_routed_experts") is None:
            dense = layers
        blocks: dict[str, Any] = {}
        if dense:
            ffn = {"name": "swiglu", "hidden": given.count("intermediate_size")}
            blocks["dense"] = {"count": min(dense, layers), "ffn": ffn}
        if dense < layers:
            shared = 0
            if given.get("n_shared_experts"):
                shared = given.count("n_shared_experts", 0)
            ffn = {
                "name": "moe",
                "experts": given.count("n_routed_experts", 1, MOST_EXPERTS),
                "expert_hidden": given.count("moe_intermediate_size"),
                "shared_experts": shared,
                "router": self.router_of(given),
                "balance": self.balance_of(given),
            }
            blocks["moe"] = {"count": layers - dense, "ffn": ffn}
        return blocks

    def config_of(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the configuration of a recipe's model, or raises `ConfigError` for what it cannot express."""
        layout = layout_of(recipe, self.attention_name)
        model = recipe["model"]
        attention = layout.attention
        _check_latent_eps(model, attention)
        if layout.depths and layout.experts is None:
            raise ConfigError(
                "model.heads",
                "a multi-token module has experts in this architecture, and these blocks have none",
            )
        routing = self.routing_of(layout)
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_type,
            "vocab_size": layout.vocabulary,
            "hidden_size": layout.dim,
            "num_hidden_layers": layout.layers,
            "first_k_dense_replace": layout.dense,
            "num_attention_heads": attention["heads"],
            "num_key_value_heads": attention["heads"],
            "q_lora_rank": attention["q_rank"],
            "kv_lora_rank": attention["kv_rank"],
            "qk_nope_head_dim": attention["nope_dim"],
            "qk_rope_head_dim": attention["rope_dim"],
            "v_head_dim": attention["value_dim"],
            **self.attention_keys(attention),
            **self._widths(layout),
            **routing,
            "moe_layer_freq": 1,
            "rms_norm_eps": model["norm_eps"],
            "tie_word_embeddings": layout.tied,
            "initializer_range": model["init"]["std"],
            **yarn.config_of(model["rope"]),
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "pretraining_tp": 1,
            "use_cache": True,
        }

    def _widths(self, layout: HfLayout) -> dict[str, int]:
        """Returns the widths of the layers; keys of layers that the model lacks must be present and have no effect."""
        experts = layout.experts
        hidden = layout.hidden or layout.dim
        if experts is None:
            return {
                "intermediate_size": hidden,
                "moe_intermediate_size": hidden,
                "n_routed_experts": 1,
                "n_shared_experts": 1,
                "num_experts_per_tok": 1,
            }
        return {
            "intermediate_size": hidden,
            "moe_intermediate_size": experts["expert_hidden"],
            "n_routed_experts": experts["experts"],
            "n_shared_experts": experts["shared_experts"],
            "num_experts_per_tok": experts["router"]["top_k"],
        }

    def tensor_mappings(
        self, config: Mapping[str, Any], recipe: Mapping[str, Any], names: Collection[str] | None
    ) -> Iterator[TensorMapping]:
        """Yields the tensor mappings in the order of the layers."""
        return tensor_mappings(
            layout_of(recipe, self.attention_name),
            names,
            interleaved=self.interleaved(config),
            biased=self.biased,
        )

    def ignores(self, name: str) -> bool:
        """Ignores tables of rotary frequencies, which early files hold."""
        return name.endswith(".rotary_emb.inv_freq")

    def interleaved(self, config: Mapping[str, Any]) -> bool:
        """Returns whether rotated rows are stored in pairs."""
        return True

    def attention_of(self, given: HfConfig) -> dict[str, Any]:
        """Returns the section of our attention."""
        return {"name": self.attention_name, **_latent_widths(given)}

    def attention_keys(self, attention: Mapping[str, Any]) -> dict[str, Any]:
        """Returns keys of the attention that only this generation has."""
        return {}

    @abstractmethod
    def allowed(self) -> dict[str, tuple[Any, ...]]:
        """Returns the allowed values of further keys; the first of each is named in error messages."""

    @abstractmethod
    def router_of(self, given: HfConfig) -> dict[str, Any]:
        """Returns the section of our router."""

    @abstractmethod
    def balance_of(self, given: HfConfig) -> list[dict[str, Any]]:
        """Returns the balancers with which training continues, among them the one that holds the bias."""

    @abstractmethod
    def routing_of(self, layout: HfLayout) -> dict[str, Any]:
        """Returns the configuration's keys of the router, and those that only this generation has."""


def _check_against_files(given: HfConfig, layers: int, depths: int, names: Collection[str]) -> None:
    """Compares the numbers of layers and experts with the tensors in the files, before a model is built from them.

    Args:
        given: the configuration.
        layers: its layers.
        depths: its modules of multi-token prediction.
        names: the tensors.

    Raises:
        ConfigError: there are more layers or experts than tensors, or files hold a layer that is not counted.
    """
    if "model.embed_tokens.weight" not in names:  # not the whole list
        return
    files = f"the files hold {len(names)} tensors"
    if layers > len(names):
        raise ConfigError("num_hidden_layers", f"is more than there can be: {files}")
    experts = given.get("n_routed_experts")
    packed = any(name.endswith(".experts.gate_up_proj") for name in names)
    if isinstance(experts, int) and experts > len(names) and not packed:
        raise ConfigError("n_routed_experts", f"is more than there can be: {files}")
    beyond = sorted({number for number in map(_layer_of, names) if number >= layers + depths})
    if beyond:
        listed = ", ".join(map(str, beyond[:5]))
        found = f"the files hold layers that are not counted ({listed})"
        if any(name == f"model.layers.{beyond[0]}.eh_proj.weight" for name in names):
            why = f"{found}, modules of multi-token prediction: give {beyond[-1] + 1 - layers}"
            raise ConfigError("num_nextn_predict_layers", why)
        raise ConfigError("num_hidden_layers", found)


def _layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 for one that belongs to none."""
    number = name.removeprefix("model.layers.").partition(".")[0]
    if name.startswith("model.layers.") and number.isdecimal():
        return int(number[:9])
    return -1


def _check_latent_eps(model: Mapping[str, Any], attention: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless the latent norms have the epsilon that transformers always gives them."""
    key = "model.norm_eps"
    eps = model["norm_eps"]
    if attention["norm_eps"] is not None:
        key = "model.attention.norm_eps"
        eps = attention["norm_eps"]
    if eps != LATENT_EPS:
        raise ConfigError(
            key,
            f"must give the latent norms the epsilon {LATENT_EPS:g}, which transformers always uses for them",
        )


def _latent_widths(given: HfConfig) -> dict[str, Any]:
    """Returns the keys that every attention with latents has.

    Raises:
        ConfigError: the heads together have more rows of queries than can be listed.
    """
    q_rank = given.get("q_lora_rank")
    heads = given.count("num_attention_heads")
    nope_dim = given.count("qk_nope_head_dim")
    rope_dim = given.count("qk_rope_head_dim")
    rows = heads * (nope_dim + rope_dim)
    if rows > MOST_ROWS:
        raise ConfigError("num_attention_heads", f"gives {rows} rows of queries, over {MOST_ROWS}")
    section = {
        "heads": heads,
        "q_rank": None if q_rank is None else given.count("q_lora_rank"),
        "kv_rank": given.count("kv_lora_rank"),
        "nope_dim": nope_dim,
        "rope_dim": rope_dim,
        "value_dim": given.count("v_head_dim"),
    }
    if given.number("rms_norm_eps") == LATENT_EPS:
        return section
    return {**section, "norm_eps": LATENT_EPS}


def group_keys(given: HfConfig, experts_per_group_score: int) -> dict[str, Any]:
    """Returns our router's keys of groups.

    Args:
        given: the configuration.
        experts_per_group_score: how many experts of a group its score is made of.

    Raises:
        ConfigError: the experts cannot be divided or chosen like that.
    """
    experts = given.count("n_routed_experts")
    top_k = given.count("num_experts_per_tok")
    groups = 1 if given.get("n_group") is None else given.count("n_group")
    limit = groups if given.get("topk_group") is None else given.count("topk_group")
    if experts % groups:
        raise ConfigError("n_group", f"must divide n_routed_experts = {experts}")
    if limit > groups:
        raise ConfigError("topk_group", f"must be at most n_group = {groups}")
    group_size = experts // groups
    if limit < groups and group_size < experts_per_group_score:
        raise ConfigError(
            "n_group",
            f"must leave at least {experts_per_group_score} experts in a group, "
            "because its score is made of so many",
        )
    if top_k > group_size * limit:
        raise ConfigError(
            "num_experts_per_tok",
            f"must be at most {group_size * limit}, the experts in topk_group = {limit} groups",
        )
    return {"groups": groups, "group_limit": limit if groups > 1 else None}


def router_section(layout: HfLayout, name: str, architecture: str) -> Mapping[str, Any]:
    """Returns the section of the recipe's router; raises `ConfigError` if its name is not `name`."""
    assert layout.experts is not None
    router: Mapping[str, Any] = layout.experts["router"]
    if router["name"] != name:
        raise ConfigError(
            "model.blocks",
            f"the router must be {name}, not {router['name']}: {architecture} has no other",
        )
    return router
