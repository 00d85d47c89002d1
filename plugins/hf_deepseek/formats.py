"""The formats `deepseek_v3` and `deepseek_v2`: configuration to recipe and back, and the pieces."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from core.contracts.checkpoint_format import CheckpointFormat, Piece, Translation
from core.contracts.errors import Wrong
from plugins.hf_deepseek import yarn
from plugins.hf_deepseek.config import FP8, LATENT_EPS, SMALLEST_VOCABULARY, Given
from plugins.hf_deepseek.layout import Layout, layout_of
from plugins.hf_deepseek.names import pieces

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


class _DeepSeek(CheckpointFormat):
    """What both generations share: all but the router, its bias, and the multi-token modules."""

    defaults: ClassVar[Mapping[str, Any]]
    biased: ClassVar[bool]
    fp8_config = FP8

    @dataclass(kw_only=True)
    class Config:
        """There is nothing to set."""

    def recipe_of(self, config: Mapping[str, Any], names: Collection[str], precision: str) -> Translation:
        """Every key that a forward depends on is translated or refused."""
        given = Given(config, self.defaults)
        given.check(**self.allowed())
        rope, notices = yarn.rope_of(config, given.count("max_position_embeddings"))
        heads: dict[str, Any] = {"next_token": {"name": "next_token"}}
        depths = given.count("num_nextn_predict_layers", 0)
        first = given.count("num_hidden_layers")
        if depths and any(name.startswith(f"model.layers.{first}.") for name in names):
            heads["mtp"] = {"name": "mtp", "depth": depths}
        elif depths:
            notices.append(
                "num_nextn_predict_layers is set, and there are no such weights: no multi-token head is made"
            )
        model = {
            "dim": given.count("hidden_size"),
            "attention": _attention(given),
            "rope": rope,
            "init": {"std": given.number("initializer_range")},
            "norm_eps": given.number("rms_norm_eps"),
            "tied_embedding": bool(given.get("tie_word_embeddings")),
            "blocks": self._blocks(given),
            "heads": heads,
        }
        data = {
            "tokenizer": {"vocab": given.count("vocab_size", SMALLEST_VOCABULARY)},
            "sequence_length": min(rope["max_length"], 4096),
        }
        recipe = {
            "model": model,
            "precision": {"name": precision},
            "data": data,
            "optimizer": {"name": "adamw", "lr": 7.3e-6},  # the last of DeepSeek-V3's (report, section 4.2)
            "batch": {"sequences": 1},
            "budget": {"steps": 1000},
        }
        return Translation(recipe, tuple(notices))

    def _blocks(self, given: Given) -> dict[str, Any]:
        layers, dense = given.count("num_hidden_layers"), given.count("first_k_dense_replace", 0)
        if given.get("n_routed_experts") is None:
            dense = layers
        blocks: dict[str, Any] = {}
        if dense:
            ffn = {"name": "swiglu", "hidden": given.count("intermediate_size")}
            blocks["dense"] = {"count": min(dense, layers), "ffn": ffn}
        if dense < layers:
            ffn = {
                "name": "moe",
                "experts": given.count("n_routed_experts"),
                "expert_hidden": given.count("moe_intermediate_size"),
                "shared_experts": given.count("n_shared_experts", 0) if given.get("n_shared_experts") else 0,
                "router": self.router_of(given),
                "balance": self.balance_of(given),
            }
            blocks["moe"] = {"count": layers - dense, "ffn": ffn}
        return blocks

    def config_of(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """One configuration, where one can say it."""
        layout, model = layout_of(recipe), recipe["model"]
        attention = layout.attention
        eps = attention["norm_eps"] if attention["norm_eps"] is not None else model["norm_eps"]
        if eps != LATENT_EPS:
            key = "model.attention.norm_eps" if attention["norm_eps"] is not None else "model.norm_eps"
            raise Wrong(key, f"must make the latents' epsilon {LATENT_EPS:g}: transformers takes that for them always")
        if layout.depths and layout.experts is None:
            raise Wrong(
                "model.heads", "a multi-token module has experts in this architecture, and these blocks have none"
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

    def _widths(self, layout: Layout) -> dict[str, int]:
        """Of the layers; where a kind is missing its numbers are used by nobody, and must still be there."""
        experts, hidden = layout.experts, layout.hidden or layout.dim
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

    def pieces(
        self, config: Mapping[str, Any], recipe: Mapping[str, Any], names: Collection[str] | None
    ) -> Iterator[Piece]:
        """In the order of the layers."""
        return pieces(layout_of(recipe), names, interleaved=self.interleaved(config), biased=self.biased)

    def ignores(self, name: str) -> bool:
        """Tables of rotary frequencies, which early files hold."""
        return name.endswith(".rotary_emb.inv_freq")

    def interleaved(self, config: Mapping[str, Any]) -> bool:
        """Whether rotated rows stand in pairs."""
        return True

    @abstractmethod
    def allowed(self) -> dict[str, tuple[Any, ...]]:
        """Further keys and what they may be."""

    @abstractmethod
    def router_of(self, given: Given) -> dict[str, Any]:
        """Our router's section."""

    @abstractmethod
    def balance_of(self, given: Given) -> list[dict[str, Any]]:
        """How training goes on, and what holds the bias."""

    @abstractmethod
    def routing_of(self, layout: Layout) -> dict[str, Any]:
        """Their keys of the router, and of what only one generation has."""


def _attention(given: Given) -> dict[str, Any]:
    q_rank = given.get("q_lora_rank")
    section = {
        "name": "mla",
        "heads": given.count("num_attention_heads"),
        "q_rank": None if q_rank is None else given.count("q_lora_rank"),
        "kv_rank": given.count("kv_lora_rank"),
        "nope_dim": given.count("qk_nope_head_dim"),
        "rope_dim": given.count("qk_rope_head_dim"),
        "value_dim": given.count("v_head_dim"),
    }
    return section if given.number("rms_norm_eps") == LATENT_EPS else {**section, "norm_eps": LATENT_EPS}


def _groups(given: Given, spokesmen: int) -> dict[str, Any]:
    """Groups and how many of them a token reaches; each must hold the experts that speak for it."""
    experts, top_k = given.count("n_routed_experts"), given.count("num_experts_per_tok")
    groups = 1 if given.get("n_group") is None else given.count("n_group")
    reach = groups if given.get("topk_group") is None else given.count("topk_group")
    if experts % groups:
        raise Wrong("n_group", f"must divide n_routed_experts = {experts}")
    if reach > groups:
        raise Wrong("topk_group", f"must be at most n_group = {groups}")
    if reach < groups and experts // groups < spokesmen:
        raise Wrong("n_group", f"must leave {spokesmen} experts in a group: so many speak for it")
    if top_k > experts // groups * reach:
        raise Wrong("num_experts_per_tok", f"must be at most {experts // groups * reach}, what topk_group leaves")
    return {"groups": groups, "group_limit": reach if groups > 1 else None}


def _router(layout: Layout, name: str, whose: str) -> Mapping[str, Any]:
    assert layout.experts is not None
    router: Mapping[str, Any] = layout.experts["router"]
    if router["name"] != name:
        raise Wrong("model.blocks", f"the router must be {name}, not {router['name']}: {whose} has no other")
    return router


class DeepSeekV3(_DeepSeek):
    """`DeepseekV3ForCausalLM`: sigmoid affinities with a selection bias, and multi-token modules."""

    architectures = ("DeepseekV3ForCausalLM",)
    model_type = "deepseek_v3"
    paper = "DeepSeek-V3 technical report (arXiv 2412.19437)"
    example = {"name": "deepseek_v3"}
    example_config = {"architectures": ["DeepseekV3ForCausalLM"], "num_nextn_predict_layers": 1, **EXAMPLE}
    biased = True
    defaults = {
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 0,
    }

    def allowed(self) -> dict[str, tuple[Any, ...]]:
        """The released routing."""
        return {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)}

    def interleaved(self, config: Mapping[str, Any]) -> bool:
        """As `rope_interleave` says; true where it says nothing."""
        return config.get("rope_interleave") in (True, None)

    def router_of(self, given: Given) -> dict[str, Any]:
        """A group is as strong as its two best experts, always."""
        if given.get("norm_topk_prob") and given.count("num_experts_per_tok") == 1:
            raise Wrong(
                "num_experts_per_tok", "must be at least 2 with norm_topk_prob: the gate of top_k 1 would be a constant"
            )
        section = {
            "name": "deepseek_v3",
            "top_k": given.count("num_experts_per_tok"),
            **_groups(given, 2),
            "scale": given.number("routed_scaling_factor"),
            "normalise": bool(given.get("norm_topk_prob")),
        }
        if section["group_limit"] is not None and section["group_limit"] < section["groups"]:
            section["group_score"] = 2
        return section

    def balance_of(self, given: Given) -> list[dict[str, Any]]:
        """The report's: the bias goes on moving in training."""
        return [{"name": "bias", "rate": 0.001}, {"name": "sequence", "alpha": 0.0001}]

    def routing_of(self, layout: Layout) -> dict[str, Any]:
        """What vLLM and SGLang ask for is written too, where transformers takes it for granted."""
        fixed = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True, "ep_size": 1}
        fixed["num_nextn_predict_layers"] = layout.depths
        if layout.experts is None:
            return {**fixed, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
        router = _router(layout, "deepseek_v3", "DeepSeek-V3")
        groups = router["groups"]
        reach = groups if router["group_limit"] is None else router["group_limit"]
        score = router["group_score"] or max(1, router["top_k"] // reach)
        if router["affinity"] != "sigmoid":
            raise Wrong("model.blocks", "the router's affinity must be sigmoid: DeepSeek-V3 has no other")
        if reach < groups and score != 2:
            raise Wrong("model.blocks", f"the router's group_score must be 2, not {score}: DeepSeek-V3 adds up two")
        return {
            **fixed,
            "n_group": groups if reach < groups else 1,
            "topk_group": reach if reach < groups else 1,
            "norm_topk_prob": router["normalise"],
            "routed_scaling_factor": router["scale"],
        }


class DeepSeekV2(_DeepSeek):
    """`DeepseekV2ForCausalLM`: softmax affinities as they are, device-limited or not."""

    architectures = ("DeepseekV2ForCausalLM",)
    model_type = "deepseek_v2"
    paper = "DeepSeek-V2 (arXiv 2405.04434)"
    example = {"name": "deepseek_v2"}
    example_config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy",
        **EXAMPLE,
        "q_lora_rank": None,
    }
    biased = False
    defaults = {
        "n_group": None,
        "topk_group": None,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 2048,
        "topk_method": "greedy",
        "num_nextn_predict_layers": 0,
    }

    def allowed(self) -> dict[str, tuple[Any, ...]]:
        """The released routing; transformers would ignore a normalisation."""
        return {
            "scoring_func": ("softmax", None),
            "norm_topk_prob": (False, None),
            "topk_method": ("greedy", "group_limited_greedy"),
            "num_nextn_predict_layers": (0, None),
            "rope_interleave": (True, None),
        }

    def router_of(self, given: Given) -> dict[str, Any]:
        """Groups count only where the method asks for them."""
        limited = given.get("topk_method") == "group_limited_greedy"
        return {
            "name": "deepseek_v2",
            "top_k": given.count("num_experts_per_tok"),
            **(_groups(given, 1) if limited else {}),
            "scale": given.number("routed_scaling_factor"),
        }

    def balance_of(self, given: Given) -> list[dict[str, Any]]:
        """The expert-level loss; its device-level losses need to know the devices."""
        return [{"name": "expert"}]

    def routing_of(self, layout: Layout) -> dict[str, Any]:
        """`greedy` without groups."""
        if layout.depths:
            raise Wrong("model.heads", "DeepSeek-V2 has no multi-token module (--main-only leaves it out)")
        if layout.bias is not None:
            raise Wrong("model.blocks", "DeepSeek-V2 has no selection bias, and these experts have one")
        fixed: dict[str, Any] = {"scoring_func": "softmax", "norm_topk_prob": False}
        router = None if layout.experts is None else _router(layout, "deepseek_v2", "DeepSeek-V2")
        scale = 1.0 if router is None else router["scale"]
        if router is None or router["group_limit"] in (None, router["groups"]):
            none = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
            return {**fixed, **none, "routed_scaling_factor": scale}
        groups = {"n_group": router["groups"], "topk_group": router["group_limit"]}
        return {**fixed, "topk_method": "group_limited_greedy", **groups, "routed_scaling_factor": scale}
