"""The checkpoint format `deepseek_v32`."""

from collections.abc import Mapping
from typing import Any

from core.contracts.errors import ConfigError
from plugins.hf_deepseek.config import HfConfig
from plugins.hf_deepseek.family import EXAMPLE
from plugins.hf_deepseek.layout import HfLayout
from plugins.hf_deepseek.v3 import DeepSeekV3


class DeepSeekV32(DeepSeekV3):
    """`DeepseekV32ForCausalLM`: DeepSeek-V3 with sparse attention."""

    architectures = ("DeepseekV32ForCausalLM",)
    model_type = "deepseek_v32"
    paper = "DeepSeek-V3.2 (arXiv 2512.02556)"
    example = {"name": "deepseek_v32"}
    example_config = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "num_nextn_predict_layers": 1,
        **EXAMPLE,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 8,
    }
    attention_name = "sparse"
    defaults = {
        **DeepSeekV3.defaults,
        "max_position_embeddings": 163840,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
    }

    def allowed(self) -> dict[str, tuple[Any, ...]]:
        """Allows rotated rows in pairs only: transformers knows no other for this architecture."""
        return {**super().allowed(), "rope_interleave": (True, None)}

    def attention_of(self, given: HfConfig) -> dict[str, Any]:
        """Returns the section of `sparse`, without a warm-up: the indexers are trained."""
        if given.get("q_lora_rank") is None:
            why = "must be given: the indexer's queries come from the query latent"
            raise ConfigError("q_lora_rank", why)
        return {
            **super().attention_of(given),
            "index_heads": given.count("index_n_heads"),
            "index_dim": given.count("index_head_dim"),
            "top_k": given.count("index_topk"),
        }

    def attention_keys(self, attention: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keys of the indexer."""
        return {
            "index_n_heads": attention["index_heads"],
            "index_head_dim": attention["index_dim"],
            "index_topk": attention["top_k"],
        }

    def routing_of(self, layout: HfLayout) -> dict[str, Any]:
        """Returns the keys of DeepSeek-V3's router; this architecture has no `rope_interleave`."""
        keys = super().routing_of(layout)
        del keys["rope_interleave"]
        return keys
