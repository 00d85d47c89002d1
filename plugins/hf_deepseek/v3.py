"""The checkpoint format `deepseek_v3`."""

from collections.abc import Mapping
from typing import Any

from core.contracts.errors import ConfigError
from plugins.hf_deepseek.config import HfConfig
from plugins.hf_deepseek.family import EXAMPLE, DeepSeek, group_keys, router_section
from plugins.hf_deepseek.layout import HfLayout


class DeepSeekV3(DeepSeek):
    """`DeepseekV3ForCausalLM`: sigmoid affinities with a selection bias, and multi-token modules."""

    architectures = ("DeepseekV3ForCausalLM",)
    model_type = "deepseek_v3"
    other_model_types = ("kimi_k2",)
    paper = "DeepSeek-V3 technical report (arXiv 2412.19437)"
    example = {"name": "deepseek_v3"}
    example_config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_nextn_predict_layers": 1,
        **EXAMPLE,
    }
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
        """Allows the routing of the released model only."""
        return {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)}

    def interleaved(self, config: Mapping[str, Any]) -> bool:
        """Returns `rope_interleave`, which is true if it is missing."""
        return config.get("rope_interleave") in (True, None)

    def router_of(self, given: HfConfig) -> dict[str, Any]:
        """Returns the section of `deepseek_v3`; the score of a group is the sum of its two best experts."""
        if given.get("norm_topk_prob") and given.count("num_experts_per_tok") == 1:
            raise ConfigError(
                "num_experts_per_tok",
                "must be at least 2 with norm_topk_prob: the gate of top_k 1 would be a constant",
            )
        section = {
            "name": "deepseek_v3",
            "top_k": given.count("num_experts_per_tok"),
            **group_keys(given, 2),
            "scale": given.number("routed_scaling_factor"),
            "normalise": bool(given.get("norm_topk_prob")),
        }
        if section["group_limit"] is not None and section["group_limit"] < section["groups"]:
            section["group_score"] = 2
        return section

    def balance_of(self, given: HfConfig) -> list[dict[str, Any]]:
        """Returns the balancers of the report: training continues to adjust the bias."""
        return [{"name": "bias", "rate": 0.001}, {"name": "sequence", "alpha": 0.0001}]

    def routing_of(self, layout: HfLayout) -> dict[str, Any]:
        """Returns the keys of the router, those included that only vLLM and SGLang read."""
        fixed = {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_interleave": True,
            "ep_size": 1,
            "num_nextn_predict_layers": layout.depths,
        }
        if layout.experts is None:
            return {
                **fixed,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
            }
        router = router_section(layout, "deepseek_v3", "DeepSeek-V3")
        groups = router["groups"]
        limit = groups if router["group_limit"] is None else router["group_limit"]
        is_limited = limit < groups
        score = router["group_score"] or max(1, router["top_k"] // limit)
        if router["affinity"] != "sigmoid":
            raise ConfigError(
                "model.blocks", "the router's affinity must be sigmoid: DeepSeek-V3 has no other"
            )
        if is_limited and score != 2:
            raise ConfigError(
                "model.blocks",
                f"the router's group_score must be 2, not {score}: "
                "DeepSeek-V3 always adds up the two best experts of a group",
            )
        return {
            **fixed,
            "n_group": groups if is_limited else 1,
            "topk_group": limit if is_limited else 1,
            "norm_topk_prob": router["normalise"],
            "routed_scaling_factor": router["scale"],
        }
