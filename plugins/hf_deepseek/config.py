"""Reading a configuration file: values with transformers' defaults, and what must hold for every model."""

from collections.abc import Mapping
from typing import Any

from core.contracts.errors import Wrong

LATENT_EPS = 1e-6
"""Epsilon of the two latent norms: transformers and the released code take it whatever `rms_norm_eps` is."""

SMALLEST_VOCABULARY = 257
"""A recipe's: 256 bytes and a marker."""

COMMON = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "q_lora_rank": 1536,
}
MUST_BE = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1, None),
    "attention_dropout": (0, 0.0, None),
}
"""Keys that would change a forward, and the values that change nothing."""

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
"""What a released checkpoint says of its FP8 weights."""


class Given:
    """A configuration with defaults.

    Args:
        config: the file's content.
        defaults: what transformers takes where a key is missing.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._config, self._defaults = config, {**COMMON, **defaults}

    def get(self, key: str) -> Any:
        """A value that may be null.

        Raises:
            Wrong: it is missing and has no default.
        """
        if key in self._config:
            return self._config[key]
        if key not in self._defaults:
            raise Wrong(key, "this key is missing")
        return self._defaults[key]

    def count(self, key: str, low: int = 1) -> int:
        """A whole number.

        Raises:
            Wrong: it is missing, none, or too small.
        """
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise Wrong(key, f"must be a whole number of at least {low}")
        return value

    def number(self, key: str) -> float:
        """A number.

        Raises:
            Wrong: it is missing or none.
        """
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise Wrong(key, "must be a number")
        return float(value)

    def check(self, **more: tuple[Any, ...]) -> None:
        """Raises `Wrong` for a setting that no layer here has; `more` are further keys and what they may be."""
        for key, allowed in {**MUST_BE, **more}.items():
            if key in self._config and self._config[key] not in allowed:
                raise Wrong(key, f"must be {_shown(allowed[0])}: nothing else is supported")
        heads = self._config.get("num_key_value_heads")
        if heads not in (None, self.get("num_attention_heads")):
            raise Wrong("num_key_value_heads", "must equal num_attention_heads, as latent attention has it")
        self._check_fp8()

    def _check_fp8(self) -> None:
        quantisation = self._config.get("quantization_config")
        if quantisation is None:
            return
        for key in ("quant_method", "fmt", "weight_block_size"):
            if not isinstance(quantisation, dict) or quantisation.get(key, FP8[key]) != FP8[key]:
                raise Wrong("quantization_config", f"must have {key} {FP8[key]}: only the released FP8 blocks are read")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
