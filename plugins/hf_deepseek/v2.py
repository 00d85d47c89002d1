"""The checkpoint format `deepseek_v2`."""

from typing import Any

from core.contracts.errors import ConfigError
from plugins.hf_deepseek.config import HfConfig
from plugins.hf_deepseek.family import EXAMPLE, DeepSeek, group_keys, router_section
from plugins.hf_deepseek.layout import HfLayout


class DeepSeekV2(DeepSeek):
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
        """Allows the routing of the released model only; transformers would ignore a normalisation."""
        return {
            "scoring_func": ("softmax", None),
            "norm_topk_prob": (False, None),
            "topk_method": ("greedy", "group_limited_greedy"),
            "num_nextn_predict_layers": (0, None),
            "rope_interleave": (True, None),
        }

    def router_of(self, given: HfConfig) -> dict[str, Any]:
        """Returns the section of `deepseek_v2`; groups are used only if `topk_method` limits them."""
        groups: dict[str, Any] = {}
        if given.get("topk_method") == "group_limited_greedy":
            groups = group_keys(given, 1)
        return {
            "name": "deepseek_v2",
            "top_k": given.count("num_experts_per_tok"),
            **groups,
            "scale": given.number("routed_scaling_factor"),
        }

    def balance_of(self, given: HfConfig) -> list[dict[str, Any]]:
        """Returns the expert-level loss; the paper's device-level losses depend on the devices of the training."""
        return [{"name": "expert"}]

    def routing_of(self, layout: HfLayout) -> dict[str, Any]:
        """Returns the keys of the router; `topk_method` is `greedy` if no groups are limited."""
        if layout.depths:
            raise ConfigError(
                "model.heads", "DeepSeek-V2 has no multi-token module (--main-only leaves it out)"
            )
        if layout.bias is not None:
            raise ConfigError(
                "model.blocks", "DeepSeek-V2 has no selection bias, and these experts have one"
            )
        keys: dict[str, Any] = {
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
        }
        if layout.experts is None:
            return keys
        router = router_section(layout, "deepseek_v2", "DeepSeek-V2")
        keys["routed_scaling_factor"] = router["scale"]
        if router["group_limit"] not in (None, router["groups"]):
            keys["topk_method"] = "group_limited_greedy"
            keys["n_group"] = router["groups"]
            keys["topk_group"] = router["group_limit"]
        return keys
